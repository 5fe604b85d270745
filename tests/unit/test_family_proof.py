"""Proves of every family, on a tiny random model: removing groups equals masking them, and the export is that model.

The models are fp32, with grouped queries, odd counts and LoRA. Each has two layers that lose other groups.

Differences are measured in standard deviations of the logits. A masked sum has the same terms as the shorter one, and
zeros. So the two differ by the order of adding alone, some 1e-7 in each of a few layers. A wrong index moves the logits
by 1 or more. TOLERANCE lies between these. A reloaded model has the same tensors and does the same operations.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraprune_ds.config import LoraConfig
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.model.adapters import add_lora, lora_linear, lora_weights
from loraprune_ds.model.classes import build_on_meta, decoder_layers
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.family import FAMILIES, Family, Kind
from loraprune_ds.model.pretrained import PretrainedModel, open_pretrained
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.weight_files import write_index, write_weight_file
from loraprune_ds.pruning.prunable_model import LayerKeep
from tests.export_cases import model_card
from tests.families import SIZES, tiny_model
from tests.plain_model import PlainModel

TOLERANCE = 1e-5
MATTERS = 0.1  # a smaller difference would not show that a group is gone
PROMPT = torch.randint(3, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(5))
FEW, MANY = (3, 13), (4, 14)  # groups that stay of 5 heads and 23 channels. 6 query heads divide hidden_size, 8 do not
NARROW = (1, 6)  # and of those of FEW
# A norm over the whole width adds epsilon to a mean over more elements before a cut than after it. So it must be tiny.
WIDE_NORMS = [name for name, family in FAMILIES.items() if family.companions]
TINY_EPSILON: dict[str, Any] = {"rms_norm_eps": 1e-12}
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # renamed, and PEFT asks


@dataclass
class Network:
    """Holds a model under LoRA and its sizes."""

    model: PeftModel
    shape: ModelShape
    config: dict[str, Any]

    @torch.no_grad()
    def logits(self, prompt: Tensor = PROMPT) -> Tensor:
        return self.model(input_ids=prompt, use_cache=False).logits

    def cut(self, keep: list[LayerKeep]) -> None:
        """Cuts by the package's own table, as a run in one process does."""
        plain = PlainModel(self.model, self.shape)
        plain.cut(keep)
        self.shape = plain.shape


def with_lora(model: PreTrainedModel, config: dict[str, Any], where: str) -> Network:
    """Wraps a model. No factor of its LoRA is zero."""
    shape = shape_from_config(config, where)
    wrapped = add_lora(model, shape, LoraConfig(r=3), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    for layer in decoder_layers(wrapped):
        for linear in shape.linears:
            lora_weights(lora_linear(layer, linear))[1].data.normal_(0, 0.1, generator=generator)
    return Network(wrapped, shape, config)


def dense(family: str) -> Network:
    model = tiny_model(family, **(TINY_EPSILON if family in WIDE_NORMS else {}))
    return with_lora(model, source_config(model), family)


def source_config(model: PreTrainedModel) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


def draw(shape: ModelShape, *counts: tuple[int, int]) -> list[LayerKeep]:
    """Draws the groups that stay in each layer."""
    generator = torch.Generator().manual_seed(3)

    def some(total: int, kept: int) -> Tensor:
        return torch.randperm(total, generator=generator)[:kept].sort().values

    layers = zip(shape.layers, counts, strict=True)
    return [LayerKeep(some(now.heads, heads), some(now.channels, channels)) for now, (heads, channels) in layers]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


# Masks, written without the table's indices: a group is an equal share of what its linear reads


def mask(network: Network, keep: list[LayerKeep]) -> None:
    """Zeroes what the other groups send into the linears that end attention and MLP."""
    for i, layer in enumerate(decoder_layers(network.model)):
        for linear in network.shape.input_linears:
            module: Any = layer.get_submodule(linear.name)
            module.register_forward_pre_hook(
                times_input(stays(network.shape, i, keep[i], linear.kind, module.in_features))
            )


def stays(shape: ModelShape, layer: int, keep: LayerKeep, kind: Kind, size: int) -> Tensor:
    """Returns (size,) with 1 where a kept group is, 0 elsewhere."""
    groups = torch.zeros(shape.layers[layer].count(kind))
    groups[keep.of(kind)] = 1
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
            linear.register_forward_hook(lambda module, inputs, output, factors=factors: output * factors)
            norm.weight.data *= factors.mean().sqrt()


def assert_masked_equals_cut(network: Network, masked: Network, counts: list[tuple[int, int]]) -> None:
    """Cuts one of two equal models and masks the other."""
    keep, before = draw(network.shape, *counts), network.logits()
    mask(masked, keep)
    if network.shape.family.companions:
        mask_before_wide_norms(masked, keep)
    network.cut(keep)
    assert difference(network.logits(), masked.logits()) < TOLERANCE
    assert difference(network.logits(), before) > MATTERS


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_cut(family: str) -> None:
    assert_masked_equals_cut(dense(family), dense(family), [FEW, MANY])


@pytest.mark.parametrize("family", WIDE_NORMS)
def test_a_mask_behind_a_wide_norm_is_another_network(family: str) -> None:
    """The mean of squares that divides all heads still has the masked ones in it. The README of model/ says so."""
    network, masked = dense(family), dense(family)
    keep = draw(network.shape, FEW, MANY)
    mask(masked, keep)
    network.cut(keep)
    assert difference(network.logits(), masked.logits()) > MATTERS


# Exports, loaded by transformers and opened by the package


@dataclass
class Export:
    """Holds an export and the cut model in memory, with LoRA merged."""

    folder: Path
    exported: ExportedConfig
    shape: ModelShape
    logits: Tensor


def export(family: str, folder: Path, *counts: tuple[int, int]) -> Export:
    """Cuts a dense model, merges LoRA and writes what a run writes."""
    network = dense(family)
    before = network.shape
    network.cut(draw(before, *counts))
    merged: Any = network.model.merge_and_unload()
    exported = export_config(network.config, network.shape, "float32")
    staging = begin(folder)
    write_index(staging, [write_weight_file(staging, 0, 1, dict(merged.named_parameters()))])
    finish_folder(staging, exported, staging, model_card(before, network.shape))
    publish(folder)
    with torch.no_grad():
        return Export(folder, exported, network.shape, merged(input_ids=PROMPT, use_cache=False).logits)


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """Loads an export as its users do. Eager attention is that of the models above."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager", **settings).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: Tensor = PROMPT) -> Tensor:
    return model(input_ids=prompt, use_cache=False).logits


def reopened(pretrained: PretrainedModel) -> PreTrainedModel:
    """Builds the model as a next run does: the package's class, and weights that are read in parts."""
    model = build_on_meta(pretrained.config).eval()
    for name, size in pretrained.shape.parameters().items():
        path, _, last = name.rpartition(".")
        weight = pretrained.read_flat(name, 0, math.prod(size), torch.float32)
        setattr(model.get_submodule(path), last, nn.Parameter(weight.view(size)))
    model.tie_weights()
    return model


@pytest.mark.parametrize("counts", [FEW, MANY])
@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_export_is_a_stock_model(family: str, counts: tuple[int, int], tmp_path: Path) -> None:
    """Only a stock class that wants its heads to divide hidden_size needs the modelling file then."""
    made = export(family, tmp_path / family, counts, counts)
    divides = counts is FEW or not FAMILIES[family].heads_divide_hidden
    stock = divides or family == "llama"  # which becomes a Mistral
    model = load(made.folder, trust_remote_code=not stock)
    assert type(model).__module__.startswith("transformers.models.") == stock
    assert made.exported.config["model_type"] == (family if divides else "mistral" if stock else f"pruned_{family}")
    assert difference(logits(model), made.logits) < TOLERANCE
    assert open_pretrained(made.folder).shape.layers == made.shape.layers


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_layers_that_differ(family: str, tmp_path: Path) -> None:
    """Loads it through its modelling file. Then opens it, and cuts what is left of it, as a next run does."""
    made = export(family, tmp_path / family, FEW, MANY)
    model = load(made.folder, trust_remote_code=True)
    assert type(model).__name__ == "PrunedForCausalLM"
    assert difference(logits(model), made.logits) < TOLERANCE
    pretrained = open_pretrained(made.folder)
    assert pretrained.shape == replace(made.shape, model_type=f"pruned_{family}")
    assert difference(logits(reopened(pretrained)), made.logits) < TOLERANCE
    again, masked = (with_lora(reopened(pretrained), pretrained.config, family) for _ in range(2))
    assert_masked_equals_cut(again, masked, [NARROW, FEW])


UNCAPPED = [name for name, family in FAMILIES.items() if family.attention_softcap is None]


def assert_sdpa_is_causal(made: Export) -> None:
    """Switches a loaded model to another implementation. A token must not see what comes after it."""
    model = load(made.folder, trust_remote_code=True)
    model.set_attn_implementation("sdpa")
    found = logits(model)
    assert difference(found, made.logits) < TOLERANCE
    other = PROMPT.clone()
    other[:, -1] += 1
    changed = logits(model, other)
    assert difference(changed[:, :-1], found[:, :-1]) < TOLERANCE
    assert difference(changed[:, -1], found[:, -1]) > MATTERS


@pytest.mark.parametrize("family", UNCAPPED)
def test_another_attention_keeps_the_causal_mask(family: str, tmp_path: Path) -> None:
    assert_sdpa_is_causal(export(family, tmp_path / family, FEW, MANY))


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - set(UNCAPPED)))
def test_capped_attention_is_not_computed_without_its_cap(family: str, tmp_path: Path) -> None:
    model = load(export(family, tmp_path / family, FEW, MANY).folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="does not support"):
        model.set_attn_implementation("sdpa")


# Faults that these tests must find

PHI3 = FAMILIES["phi3"]
QKV, *OTHERS = PHI3.linears
KEYS_FIRST = replace(QKV, parts=(QKV.parts[1], QKV.parts[0], QKV.parts[2]))


@pytest.mark.parametrize("wrong", [replace(PHI3, linears=(KEYS_FIRST, *OTHERS)), replace(PHI3, runtime=())])
def test_a_wrong_table_is_found(wrong: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the parts in another order, of the same size in all. Or leaves out the counts that a forward reads."""
    monkeypatch.setitem(FAMILIES, "phi3", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        test_masked_equals_cut("phi3")


def test_layers_that_keep_the_old_attention_are_found(tmp_path: Path) -> None:
    """Each layer of such an export has a config of its own. One that is not told gets the mask of the new one: none."""
    made = export("qwen3", tmp_path / "model", FEW, MANY)
    file = made.folder / "modeling_pruned.py"
    code = file.read_text()
    assert code.count("def set_attn_implementation") == 1
    file.write_text(code.replace("def set_attn_implementation", "def unused"))
    with pytest.raises(AssertionError):
        assert_sdpa_is_causal(made)
