"""Makes tiny random models and cuts them with plain index_select. An exported model must compute the same.

The cut is written here a second time, from the architecture alone. It shares nothing with the package's cut.
"""

import copy
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from loraprune_ds.config import PruneConfig
from loraprune_ds.export.huggingface import begin, publish, write_model
from loraprune_ds.export.model_card import ModelCard
from loraprune_ds.model.groups import LayerCounts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.text_part import Tower
from loraprune_ds.ranks.comm import Communicator

VOCAB = 400
_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
LINEAR, LLAMA3 = _FILE["linear"], _FILE["llama3"]


@dataclass(frozen=True)
class Case:
    """A dense model and how many (kv heads, channels) each layer keeps."""

    name: str
    family: str
    sizes: dict[str, Any]
    keep: list[tuple[int, int]]
    becomes: str  # model_type of the export
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES, WIDE = (
    [Case(**x | {"keep": [(h, c) for h, c in x["keep"]]}) for x in _FILE[name]]
    for name in ("cases", "wide")
)


def dense_model(case: Case) -> PreTrainedModel:
    """Makes the random dense model, fp32. Biases and norms are random too, so that losing one shows."""
    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }
    config_class, model_class = classes[case.family]
    options = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}} | case.options
    sizes: Any = {**case.sizes, **options, "vocab_size": VOCAB, "num_hidden_layers": len(case.keep)}
    names: Any = {"architectures": [model_class.__name__], "dtype": case.dtype}
    model = model_class(config_class(**sizes, **names, max_position_embeddings=64)).eval()
    generator = torch.Generator().manual_seed(len(case.name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.2 if parameter.dim() == 1 else parameter.shape[1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model


def widths(case: Case) -> tuple[int, int]:
    """Returns (query columns, key-value columns) of one group of heads."""
    head_dim = case.sizes["head_dim"]
    return case.sizes["num_attention_heads"] // case.sizes[
        "num_key_value_heads"
    ] * head_dim, head_dim


def cut(model: PreTrainedModel, case: Case) -> PreTrainedModel:
    """Copies the dense model, still of the stock class. Each layer of the copy holds only its kept groups."""
    model, draw = copy.deepcopy(model), random.Random(case.name)
    heads, channels = case.sizes["num_key_value_heads"], case.sizes["intermediate_size"]
    for layer, (h, c) in zip(
        model.get_submodule("model.layers").children(), case.keep, strict=True
    ):
        groups, kept = (
            sorted(draw.sample(range(heads), h)),
            torch.tensor(sorted(draw.sample(range(channels), c))),
        )
        queries, keys = (
            torch.tensor([g * width + i for g in groups for i in range(width)])
            for width in widths(case)
        )
        for name, rows in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)]:
            _select(layer.get_submodule(f"self_attn.{name}"), 0, rows)
        _select(layer.get_submodule("self_attn.o_proj"), 1, queries)
        for name in ("gate_proj", "up_proj"):
            _select(layer.get_submodule(f"mlp.{name}"), 0, kept)
        _select(layer.get_submodule("mlp.down_proj"), 1, kept)
    for parameter in model.parameters():  # model.to() would round the rotary frequencies too
        parameter.data = parameter.data.to(getattr(torch, case.dtype))
    return model


def _select(linear: nn.Module, axis: int, kept: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    linear.weight = nn.Parameter(linear.weight.detach().index_select(axis, kept))
    if axis == 0 and linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, kept))


def exported_config(
    model: PreTrainedModel, case: Case
) -> tuple[ExportedConfig, ModelShape, ModelShape]:
    """Returns (contents of config.json, dense shape, pruned shape)."""
    source = json.loads(model.config.to_json_string(use_diff=False))
    dense = shape_from_config(source, case.name)
    pruned = dense.resized(
        tuple(LayerCounts(heads=heads, channels=channels) for heads, channels in case.keep)
    )
    return export_config(source, pruned, case.dtype), dense, pruned


@dataclass(frozen=True)
class InMemory:
    """A cut model with merged LoRA, as the writer reads it."""

    model: Any
    shape: ModelShape
    exported: ExportedConfig
    dense_folder: Path
    tower: Tower | None = None

    def layer(self, number: int, ranks: Communicator, *, merge: bool) -> dict[str, Tensor]:
        prefixes = [self.shape.prefix(k) for k in range(len(self.shape.layers))]
        # a tied head appears once, as the embedding
        named = self.model.named_parameters()
        if number < len(prefixes):
            return {name: x for name, x in named if name.startswith(prefixes[number])}
        return {name: x for name, x in named if not name.startswith(tuple(prefixes))}


def export(model: PreTrainedModel, case: Case, source: Path, out: Path) -> ExportedConfig:
    """Writes the cut model with the package's functions. `source` is the folder of the tokenizer."""
    exported, dense, pruned = exported_config(model, case)
    card, comm = model_card(dense, pruned), Communicator()
    write_model(InMemory(cut(model, case), pruned, exported, source), begin(out), card, comm)
    publish(out)
    return exported


def model_card(dense: ModelShape, pruned: ModelShape) -> ModelCard:
    run: Any = {
        "base_model": "tiny",
        "data": "nothing",
        "steps": 1000,
        "asked": 0.5,
        "perplexity_data": "nothing",
    }
    prune = PruneConfig(criterion="lora", ranking="uniform")
    return ModelCard(**run, prune=prune, dense=dense, pruned=pruned, perplexity_pruned=12.345)
