"""Proves of every family, on a tiny random model: removing groups equals masking them, and the export is that model.

Differences are measured in standard deviations of the logits. A masked sum has the same terms and zeros, so order alone
differs, some 1e-7 a layer. A wrong index moves the logits by 1 or more. TOLERANCE lies between.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.model.classes import causal_lm_class, decoder_layers
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.weight_files import read_headers
from tests import family_cuts
from tests.families import EQUAL, SIZES, heads_divide_hidden, norms_are_wide, tiny_model
from tests.family_cuts import (
    FEW,
    MANY,
    PROMPT,
    Network,
    dense,
    difference,
    draw,
    export,
    load,
    logits,
    reopened,
)

TOLERANCE = 1e-5
MATTERS = 0.1  # a smaller difference would not show that a group is gone
NARROW = (1, 6)  # of those that FEW leaves
pytestmark = pytest.mark.usefixtures("fresh_transformers")


# Masks, written without the package's indices: a group is an equal share of what its linear reads


def mask(network: Network, keep: list[LayerKeep]) -> None:
    """Zeroes what the other groups send into the linears that end attention and MLP. No token chooses other experts."""
    for i, layer in enumerate(decoder_layers(network.model)):
        for _, linear in network.shape.input_linears([i]):
            module: Any = layer.get_submodule(linear.linear)
            if linear.stack:
                mask_router(family_cuts.find_router(layer), keep[i]["experts"])
                continue
            factors = stays(network.shape, i, keep[i], linear.runs[0].kind, module.in_features)
            module.register_forward_pre_hook(times_input(factors))


def mask_router(gate: Any, kept: Tensor) -> None:
    """Computes routers once more, as their papers have them: softmax or corrected sigmoid, the largest add up to 1.

    Gemma 4 and Hunyuan have a linear, and the rest comes after it.
    """
    others = torch.ones(len(gate.weight), dtype=torch.bool).index_fill(0, kept, False)
    if isinstance(gate, nn.Linear):
        gate.register_forward_hook(
            lambda module, inputs, logits: logits.masked_fill(others, -torch.inf)
        )
        return

    def route(hidden: Tensor, correction: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.flatten(0, -2) @ gate.weight.T + getattr(gate, "bias", 0)
        if (added := getattr(gate, CORRECTION, correction)) is not None:
            scores = logits.sigmoid()
            chosen = (scores + added).masked_fill(others, -torch.inf).topk(gate.top_k).indices
        else:
            scores = logits.masked_fill(others, -torch.inf).softmax(1)
            # Ernie 4.5 has one, too
            added = getattr(getattr(gate, "moe_statics", None), CORRECTION, torch.zeros(1))
            chosen = (scores + added).masked_fill(others, -torch.inf).topk(gate.top_k).indices
        weights = scores.gather(1, chosen)
        # DeepSeek-V2's weights stay as they are
        if getattr(gate, "norm_topk_prob", not hasattr(gate, "topk_method")):
            weights = weights / weights.sum(1, keepdim=True)
        return logits, weights * getattr(gate, "routed_scaling_factor", 1.0), chosen

    gate.forward = route


def stays(shape: ModelShape, layer: int, keep: LayerKeep, kind: Kind, size: int) -> Tensor:
    """Returns (size,) with 1 where a kept group is, 0 elsewhere."""
    groups = torch.zeros(shape.counts[layer][kind])
    groups[keep[kind]] = 1
    assert size % len(groups) == 0
    return groups.repeat_interleave(size // len(groups))


def times_input(factors: Tensor) -> Callable[[nn.Module, tuple[Tensor]], tuple[Tensor]]:
    return lambda module, inputs: (inputs[0] * factors,)


def mask_before_wide_norms(network: Network, keep: list[LayerKeep]) -> None:
    """Zeroes queries and keys, too, and makes up for a mean over all heads instead of the kept ones."""
    for i, layer in enumerate(decoder_layers(network.model)):
        for name in ("q", "k"):
            linear: Any = layer.get_submodule(f"self_attn.{name}_proj")
            norm: Any = layer.get_submodule(f"self_attn.{name}_norm")
            factors = stays(network.shape, i, keep[i], "heads", linear.out_features)
            linear.register_forward_hook(
                lambda module, inputs, output, factors=factors: output * factors
            )
            norm.weight.data *= factors.mean().sqrt()


def assert_masked_equals_cut(
    family: str, network: Network, masked: Network, counts: list[tuple[int, int]]
) -> None:
    """Cuts one of two equal models and masks the other. In fp32 some CPUs round beyond the tolerance, so it is fp64."""
    network.model.double()
    masked.model.double()
    keep, before = draw(network.shape, *counts), network.logits()
    mask(masked, keep)
    if norms_are_wide(family):
        mask_before_wide_norms(masked, keep)
    network.cut(keep)
    assert difference(network.logits(), masked.logits()) < TOLERANCE
    assert difference(network.logits(), before) > MATTERS


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
