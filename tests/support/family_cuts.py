"""Tiny models of every family under LoRA, their cuts by the package, and exports."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from loraprune_ds.config import LoraConfig
from loraprune_ds.export.huggingface import begin, publish, write_model
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.adapters import add_lora, lora_linear, lora_weights
from loraprune_ds.model.classes import decoder_layers, shrink_on_meta
from loraprune_ds.model.experts import Experts, stack_experts
from loraprune_ds.model.family import FAMILIES, family_name
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.pretrained.read_shape import read_model, shape_from_config
from loraprune_ds.ranks.comm import Communicator
from tests.support.export_cases import InMemory, model_card
from tests.support.families import SIZES, TINY, is_seq2seq, layers_with, norms_are_wide, tiny_model

PROMPT = torch.randint(3, SIZES["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(5))
SOURCE = PROMPT.flip(1)[:, :11]  # what an encoder reads
# Groups that stay of 5 heads and 23 channels or experts. 6 query heads divide hidden_size, 8 do not.
FEW, MANY = (3, 13), (4, 14)
# A norm over the whole width adds epsilon to a mean over more elements before a cut than after it. It must be tiny.
TINY_EPSILON: dict[str, Any] = {"rms_norm_eps": 1e-12}


@dataclass
class Network:
    """Holds a model under LoRA and its sizes."""

    model: PeftModel
    shape: ModelShape
    config: dict[str, Any]

    @torch.no_grad()
    def logits(self, prompt: Tensor = PROMPT) -> Tensor:
        return logits(self.model, prompt)

    def cut(self, keep: list[LayerKeep]) -> None:
        """Cuts by the package's own specs, as a run in one process does."""
        plain = LocalModel(self.model, self.shape)
        plain.cut(keep)
        self.shape = plain.shape


def with_lora(model: PreTrainedModel, config: dict[str, Any], where: str) -> Network:
    """Wraps a model. No factor of its LoRA is zero."""
    shape = shape_from_config(config, where)
    stack_experts(model)
    wrapped = add_lora(model, shape, LoraConfig(r=3), seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    layers = decoder_layers(wrapped)
    for i, linear in shape.linears():
        lora_weights(lora_linear(layers[i], linear.linear))[1].data.normal_(
            0, 0.1, generator=generator
        )
    return Network(wrapped, shape, config)


def dense(family: str, **changes: Any) -> Network:
    model = tiny_model(family, **changes, **(TINY_EPSILON if norms_are_wide(family) else {}))
    config = json.loads(model.config.to_json_string(use_diff=False))
    # as published
    config |= {
        key: value for key, value in (TINY[family] | changes).items() if key == "layer_types"
    }
    return with_lora(in_memory(model, config, family), config, family)


def in_memory(model: PreTrainedModel, config: dict[str, Any], family: str) -> PreTrainedModel:
    """Returns a model as the package has it. Each layer of a T5 has a copy of the bias."""
    if not is_seq2seq(family):
        return model
    config |= {"tie_word_embeddings": "lm_head.weight" not in dict(model.named_parameters())}
    shape, modules = read_model(config, family)
    stock = model.get_parameter
    return filled(
        modules, shape, lambda name: stock(shape.shared_tensors.get(name, name)).detach().clone()
    )


def sparse_layers(shape: ModelShape) -> list[int]:
    """Lists the layers of a mixture that have experts."""
    return [i for i, layer in enumerate(shape.counts) if layer["experts"]]


def find_router(layer: nn.Module) -> Any:
    """Returns the module of a decoder layer that chooses experts."""
    routers = (
        module
        for module in layer.modules()
        if hasattr(module, "top_k") and hasattr(module, "weight")
    )
    linears = (
        module for name, module in layer.named_modules() if name in ("router.proj", "mlp.gate.wg")
    )
    return next(routers, None) or next(linears)


def find_experts(layer: nn.Module) -> Experts:
    return next(module for module in layer.modules() if isinstance(module, Experts))


def draw(shape: ModelShape, *counts: tuple[int, int]) -> list[LayerKeep]:
    """Draws the groups that stay in each layer."""
    generator = torch.Generator().manual_seed(3)

    def some(total: int, kept: int, ranges: int) -> Tensor:
        of_range = (
            torch.randperm(total // ranges, generator=generator)[: kept // ranges]
            for _ in range(ranges)
        )
        return (
            torch.cat([own + i * (total // ranges) for i, own in enumerate(of_range)]).sort().values
        )

    layers = zip(shape.layers, shape.counts, layers_with(shape, *counts), strict=True)
    return [
        LayerKeep(
            (kind, some(count, wanted[kind], layer.ranges.get(kind, 1)))
            for kind, count in now.items()
        )
        for layer, now, wanted in layers
    ]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@dataclass
class Export:
    """Holds an export and the cut model in memory, with LoRA merged."""

    folder: Path
    exported: ExportedConfig
    shape: ModelShape
    logits: Tensor
    model: Any  # which made the logits


def export(family: str, folder: Path, *counts: tuple[int, int], **changes: Any) -> Export:
    """Cuts a dense model of a family, and exports it."""
    return cut_and_export(dense(family, **changes), folder, *counts)


def cut_and_export(
    network: Network, folder: Path, *counts: tuple[int, int], source: PretrainedModel | None = None
) -> Export:
    """Cuts a model, merges LoRA and writes what a run writes. With the tower of `source`, if it has one."""
    before = network.shape
    network.cut(draw(before, *counts))
    merged: Any = network.model.merge_and_unload()
    tower = source.tower if source else None
    exported, staging = (
        export_config(network.config, network.shape, "float32", tower and tower.config),
        begin(folder),
    )
    written = InMemory(merged, network.shape, exported, source.folder if source else staging, tower)
    write_model(written, staging, model_card(before, network.shape), Communicator())
    publish(folder)
    return Export(folder, exported, network.shape, logits(merged), merged)


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """Loads an export as its users do. The models above have eager attention."""
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"} | settings
    config = json.loads((folder / "config.json").read_text())
    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    own = FAMILIES[family_name(config["model_type"])].lm_class()
    return (own or auto).from_pretrained(folder, dtype="auto", **settings).eval()


@torch.no_grad()
def logits(model: PreTrainedModel | PeftModel, prompt: Tensor = PROMPT) -> Tensor:
    """Returns the logits after a prompt, which an encoder reads in another order."""
    seq2seq = model.config.is_encoder_decoder
    read = {"decoder_input_ids": prompt, "input_ids": SOURCE} if seq2seq else {"input_ids": prompt}
    return model(**read, use_cache=False).logits


def reopened(pretrained: PretrainedModel) -> PreTrainedModel:
    """Builds the model as a next or resumed run does: small modules, filled with weights that are read in parts."""
    sizes, read = pretrained.shape.parameters(), pretrained.weights.read_flat
    modules = copy.deepcopy(pretrained.modules)
    return filled(
        modules,
        pretrained.shape,
        lambda name: read(name, 0, math.prod(sizes[name]), torch.float32).view(sizes[name]),
    )


def filled(
    model: PreTrainedModel, shape: ModelShape, read: Callable[[str], Tensor]
) -> PreTrainedModel:
    """Makes modules on the meta device as small as a shape, and fills them."""
    shrink_on_meta(model, shape)
    for name in shape.parameters():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, nn.Parameter(read(name)))
    model.tie_weights()
    return model.eval()
