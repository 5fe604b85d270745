"""A training checkpoint as a model: merged, or as the pruned base and its PEFT adapter. One layer at a time."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.checkpoint.layout import layer_file
from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.config import LoraConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.export.huggingface import finish_folder, merge_lora
from loraprune_ds.export.model_card import card_of_run, retell_model_card
from loraprune_ds.model.adapters import ADAPTER_FOLDER, BASE_FOLDER
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.pretrained import PretrainedModel, open_for_pruning, parameter_shapes
from loraprune_ds.model.shapes import LINEAR_NAMES, LINEARS
from loraprune_ds.model.weight_files import weight_file_count, write_index, write_weight_file

Change = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]  # of a layer's frozen tensors before they are written


class Unmerged:
    """A verified checkpoint with the model it belongs to.

    Raises:
        UserError: the model that the run was started from, which has the tokenizer, is gone or damaged.
    """

    def __init__(self, checkpoint: TrainingCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config_from_dict(checkpoint.state.config)
        self.dense = open_for_pruning(locate_model(self.config.model), self.config.prune)
        self.base = checkpoint.frozen_weights(self.config)
        # The family is the dense model's, even where the smaller one had to be described as another.
        self.shape = self.dense.shape.with_layers(self.base.shape.layers)

    @property
    def exported(self) -> ExportedConfig:
        return export_config(self.dense.config, self.shape, self.config.model.dtype)

    def lora(self, layer: int) -> dict[str, Tensor]:
        """fp32 masters of a layer: "{linear}.lora_A" (r, in_features) and "{linear}.lora_B" (out_features, r)."""
        tensors = load_file(self.checkpoint.folder / layer_file(layer))
        return {name.removesuffix(".master"): t for name, t in tensors.items() if name.endswith(".master")}


def write_merged(source: Unmerged, folder: Path) -> None:
    """Writes a Hugging Face checkpoint with LoRA merged in fp32 and rounded once: what the run would export now."""
    scaling = source.config.lora.lora_alpha / source.config.lora.r

    def merge(layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        lora = source.lora(layer)
        for linear in LINEARS:
            name, (a, b) = f"model.layers.{layer}.{linear.name}.weight", _factors(lora, linear.name)
            tensors[name] = merge_lora(tensors[name], a, b, scaling, tensors[name].dtype)
        return tensors

    _write_model(source, folder, merge)


def write_base_and_adapter(source: Unmerged, folder: Path) -> None:
    """Writes `base/`, a Hugging Face checkpoint without LoRA, and `adapter/`, the fp32 LoRA as PEFT reads it."""
    (folder / BASE_FOLDER).mkdir()
    _write_model(source, folder / BASE_FOLDER, lambda layer, tensors: tensors)
    retell_model_card(
        folder / BASE_FOLDER, folder / BASE_FOLDER, "This base has no LoRA in it: see the folder above.\n"
    )
    _write_adapter(source, folder / ADAPTER_FOLDER)


def _write_model(source: Unmerged, folder: Path, change: Change) -> None:
    dtype = getattr(torch, source.config.model.dtype)
    layers = len(source.shape.layers)
    entries = []
    for k in range(weight_file_count(layers)):
        tensors = _read_weight_file(source.base, k, dtype)
        entries.append(
            write_weight_file(folder, k, weight_file_count(layers), change(k, tensors) if k < layers else tensors)
        )
    write_index(folder, entries)
    state = source.checkpoint.state
    card = card_of_run(
        source.config,
        source.dense.shape,
        source.shape,
        steps=state.step,
        perplexity_dense=state.totals.perplexity_dense,
        perplexity_pruned=state.totals.perplexity,
    )
    finish_folder(folder, source.exported, source.dense.folder, card)


def _read_weight_file(pretrained: PretrainedModel, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Layer k; after the last layer, all that belongs to none."""
    is_layer = k < len(pretrained.shape.layers)
    prefix = f"model.layers.{k}."
    tensors = {}
    for name, size in parameter_shapes(pretrained.shape).items():
        if name.startswith(prefix) if is_layer else not name.startswith("model.layers."):
            tensors[name] = pretrained.read_flat(name, 0, torch.Size(size).numel(), dtype).view(size)
    return tensors


def _write_adapter(source: Unmerged, folder: Path) -> None:
    """LoRA as a whole is no larger than one decoder layer, and PEFT wants it in one file."""
    folder.mkdir()
    tensors = {}
    for layer in range(len(source.shape.layers)):
        for name, tensor in source.lora(layer).items():
            tensors[f"base_model.model.model.layers.{layer}.{name}.weight"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.dumps(_adapter_config(source.config.lora), indent=2)
    (folder / "adapter_config.json").write_text(config + "\n")


def _adapter_config(lora: LoraConfig) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"../{BASE_FOLDER}",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": list(LINEAR_NAMES),
        "bias": "none",
        "inference_mode": True,
    }


def _factors(lora: dict[str, Tensor], linear: str) -> tuple[Tensor, Tensor]:
    return lora[f"{linear}.lora_A"], lora[f"{linear}.lora_B"]
