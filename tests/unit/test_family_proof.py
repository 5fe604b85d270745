"""Proves of every family, on a tiny random model: removing groups equals masking them, and the export is that model.

Differences are measured in standard deviations of the logits. A masked sum has the same terms and zeros, so order alone
differs, some 1e-7 a layer. A wrong index moves the logits by 1 or more. TOLERANCE lies between.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.model.classes import causal_lm_class
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.weight_files import read_headers
from tests.support import family_cuts
from tests.support.families import EQUAL, SIZES, heads_divide_hidden, tiny_model
from tests.support.family_cuts import (
    FEW,
    MANY,
    PROMPT,
    dense,
    difference,
    draw,
    export,
    load,
    logits,
    reopened,
)
from tests.support.masking import MATTERS, TOLERANCE, assert_masked_equals_cut

NARROW = (1, 6)  # of those that FEW leaves
pytestmark = pytest.mark.usefixtures("fresh_transformers")


# Masks, written without the package's indices: a group is an equal share of what its linear reads


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_cut(family: str) -> None:
    assert_masked_equals_cut(family, dense(family), dense(family), [FEW, MANY])


# Each with a tied head and one of its own. In an encoder or decoder of a T5 all layers share one bias.
ENCODERS = ("t5", "mt5", "umt5")
DEPTHS: Any = {"num_layers": 3, "num_hidden_layers": 3, "num_decoder_layers": 2}


@pytest.mark.parametrize("family", ENCODERS)
def test_other_heads_in_each_layer_of_an_encoder_and_its_decoder(
    family: str, tmp_path: Path
) -> None:
    """In memory it is the stock model. Masked it equals a cut one, whose export generates the same with caches."""
    tiny_model(family, **DEPTHS).save_pretrained(tmp_path / "stock")
    source, counts = open_pretrained(tmp_path / "stock"), [FEW, MANY, FEW, MANY, FEW]
    assert difference(logits(reopened(source)), logits(load(tmp_path / "stock"))) < TOLERANCE
    assert_masked_equals_cut(family, dense(family, **DEPTHS), dense(family, **DEPTHS), counts)
    made = export(family, tmp_path / "cut", *counts, **DEPTHS)
    model = load(made.folder, trust_remote_code=True)
    assert difference(logits(model), made.logits) < TOLERANCE
    assert torch.equal(generate(made.model), generate(model))


@pytest.mark.parametrize("family", ENCODERS)
def test_a_cut_of_channels_alone_leaves_one_bias_in_encoder_and_decoder(
    family: str, tmp_path: Path
) -> None:
    all_heads = [(SIZES["num_key_value_heads"], 13)] * 5
    made = export(family, tmp_path / "cut", *all_heads, **DEPTHS)
    stored = read_headers(made.folder)
    assert made.exported.config["model_type"] == family
    assert sum("relative_attention_bias" in name for name in stored) == (
        5 if family == "umt5" else 2
    )
    model = load(made.folder)
    assert type(model).__module__.startswith("transformers.models.")
    assert difference(logits(model), made.logits) < TOLERANCE
    assert difference(logits(reopened(open_pretrained(made.folder))), made.logits) < TOLERANCE


# Exports, loaded by transformers and opened by the package


@pytest.mark.parametrize(
    ("family", "counts"),
    [(x, FEW) for x in FAMILIES] + [(x, MANY) for x in FAMILIES if heads_divide_hidden(x)],
)
def test_uniform_export_is_a_stock_model(
    family: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    """Only a stock class that wants its heads to divide hidden_size needs the modelling file, and only for MANY."""
    made = export(family, tmp_path / family, counts, counts)
    divides = counts is FEW
    renamed = {"llama": "mistral"} if not divides else {"t5": "umt5", "mt5": "umt5"}
    stock = divides or family in renamed
    model = load(made.folder, trust_remote_code=not stock)
    assert (type(model) is causal_lm_class(model.config.model_type)) == stock
    assert made.exported.config["model_type"] == renamed.get(
        family, family if stock else f"pruned_{family}"
    )
    assert difference(logits(model), made.logits) < TOLERANCE
    if family in EQUAL:
        check_a_next_run(family, made)
    assert open_pretrained(made.folder).shape.counts == made.shape.counts


# Those whose class can have a bias on every linear. starcoder2 always has them.
@pytest.mark.parametrize("family", ["granite", "smollm3", "arcee", "nemotron"])
def test_a_bias_on_every_linear(family: str, tmp_path: Path) -> None:
    """It is cut and exported with its linear, and is there when the export is opened."""
    made = export(family, tmp_path / "cut", FEW, MANY, attention_bias=True, mlp_bias=True)
    assert difference(logits(load(made.folder, trust_remote_code=True)), made.logits) < TOLERANCE
    shape = open_pretrained(made.folder).shape
    assert shape.counts == made.shape.counts
    assert all(linear.linear in shape.biases for _, linear in shape.linears())


# Layers that leave as a whole


def generate(model: Any) -> Tensor:
    """Returns greedy tokens by a cache, after two prompts, one of which is padded."""
    mask = torch.ones_like(PROMPT)
    mask[0, :5] = 0
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "use_cache": True,
    }
    return model.generate(input_ids=PROMPT * mask, attention_mask=mask, **settings)


UNCAPPED = [name for name, family in FAMILIES.items() if family.eager_only is None]


def assert_sdpa_is_causal(made: family_cuts.Export) -> None:
    """Switches a loaded model to another implementation. A token must not see later ones."""
    model = load(made.folder, trust_remote_code=True)
    model.set_attn_implementation("sdpa")
    found = logits(model)
    assert difference(found, made.logits) < TOLERANCE
    other = PROMPT.clone()
    other[:, -1] += 1
    changed = logits(model, other)
    assert difference(changed[:, :-1], found[:, :-1]) < TOLERANCE
    assert difference(changed[:, -1], found[:, -1]) > MATTERS


@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in EQUAL])
def test_export_of_layers_that_differ(family: str, tmp_path: Path) -> None:
    """Loads it through its modelling file, with two attentions. Then opens and cuts it again, as a next run does."""
    made = export(family, tmp_path / family, FEW, MANY)
    model = load(made.folder, trust_remote_code=True)
    assert type(model).__name__ == made.exported.config["architectures"][0]
    assert difference(logits(model), made.logits) < TOLERANCE
    if family in UNCAPPED:
        assert_sdpa_is_causal(made)
    else:  # not computed without its cap
        with pytest.raises(ValueError, match="does not support"):
            model.set_attn_implementation("sdpa")
    check_a_next_run(family, made)


def check_a_next_run(family: str, made: family_cuts.Export) -> None:
    """Opens an export, and cuts it again."""
    pretrained = open_pretrained(made.folder)
    assert pretrained.shape == replace(made.shape, model_type=made.exported.config["model_type"])
    assert difference(logits(reopened(pretrained)), made.logits) < TOLERANCE
    again, masked = (
        family_cuts.with_lora(reopened(pretrained), pretrained.config, family) for _ in range(2)
    )
    assert_masked_equals_cut(family, again, masked, [NARROW, FEW])


@pytest.mark.parametrize("family", FAMILIES)
def test_small_modules_with_slices_of_the_source_are_the_live_cut(
    family: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    source = open_pretrained(tmp_path)
    live = family_cuts.with_lora(reopened(source), source.config, family)
    keep = draw(source.shape, FEW, MANY)
    live.cut(keep)
    with live.model.disable_adapter():
        expected = live.logits()
    assert torch.equal(
        logits(reopened(replace(source, weights=source.weights.cut(keep)))), expected
    )


def test_an_export_of_layers_that_differ_trains_with_gradient_checkpointing(tmp_path: Path) -> None:
    folder, gradients = export("llama", tmp_path / "model", FEW, MANY).folder, list[list[Tensor]]()
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = load(folder, trust_remote_code=True).train()
        calls = list[int]()
        # a checkpointed layer runs again in backward, inside its own hooks
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        model(PROMPT, labels=PROMPT).loss.backward()
        assert len(calls) == (1 + checkpointing) * len(model.model.layers)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
