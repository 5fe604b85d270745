"""The models that quality.py starts from: with key-value heads repeated, or with two of four weights zero.

The latter is semi-structured sparsity, for comparison. Which two stay is decided once, by Wanda's score |W_ij| · ‖x_j‖₂
(Sun et al., arXiv 2306.11695). Then LoRA trains freely, for the steps of any other run. The export merges it and
applies the mask again. The shapes stay the dense model's.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

import json
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds.config import Dtype
from loraprune_ds.evaluate.settings import read_text
from loraprune_ds.files import read_json
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.pruning.step import Cut, Pruner
from loraprune_ds.zero.write import merged_tensors

CALIBRATION = (64, 128)  # windows, tokens of each: the first of the tuning text


def expanded_model(source: Path, folder: Path) -> Path:
    """Writes the model into `folder`, unless it is there. It computes the same (SmolLM2: 9 + 9 heads for 9 + 3)."""
    if folder.exists():
        return folder
    config = json.loads((source / "config.json").read_text())
    kv_heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    repeats = config["num_attention_heads"] // kv_heads
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            tensors[name] = repeat_heads(tensor, kv_heads, head_dim, repeats)
    return write_changed(source, folder, tensors, config | {"num_key_value_heads": config["num_attention_heads"]})


def write_changed(source: Path, folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """Writes a model whole or not at all: these tensors and this config.json, the other files as in `source`."""
    staging = folder.with_suffix(".partial")
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (staging / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, staging / "model.safetensors", {"format": "pt"})
    staging.rename(folder)
    return folder


def repeat_heads(weight: Tensor, kv_heads: int, head_dim: int, repeats: int) -> Tensor:
    """Repeats the heads of a weight or a bias: (kv_heads * head_dim, ...) -> (kv_heads * repeats * head_dim, ...)."""
    heads = weight.view(kv_heads, head_dim, -1)
    return torch.repeat_interleave(heads, repeats, dim=0).reshape(-1, *weight.shape[1:]).contiguous()


def two_of_four(weight: Tensor, norms: Tensor) -> Tensor:
    """Keeps the two of each four neighbours of a row with the largest |W_ij| · ‖x_j‖₂, and sets the others to zero."""
    blocks = (weight.abs().float() * norms).unflatten(1, (-1, 4))
    kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, blocks.topk(2, dim=2).indices, True)
    return weight * kept.flatten(1)


def sparse_model(source: Path, folder: Path, text: Path) -> Path:
    """Writes the masked model into `folder`, unless it is there."""
    if folder.exists():
        return folder
    norms = input_norms(source, text)
    tensors = load_file(source / "model.safetensors")
    for name, squares in norms.items():
        tensors[f"{name}.weight"] = two_of_four(tensors[f"{name}.weight"], squares)
    return write_changed(source, folder, tensors, read_json(source / "config.json"))


@torch.no_grad()
def input_norms(source: Path, text: Path) -> dict[str, Tensor]:
    """Returns ‖x_j‖₂ over the calibration tokens, (in_features,) fp32 of each linear by its name."""
    windows, tokens = CALIBRATION
    ids = cast(list[int], AutoTokenizer.from_pretrained(source)(read_text(text).text)["input_ids"])
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    squares: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def see(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        squares[name] = squares[name] + inputs[0].float().square().sum((0, 1))

    for name, module in model.named_modules():
        if any(name.endswith(f".{linear.name}") for linear in LLAMA_LINEARS):
            module.register_forward_pre_hook(partial(see, name))
    for batch in torch.tensor(ids[: windows * tokens]).view(windows, tokens).split(8):
        model(input_ids=batch)
    return {name: value.sqrt() for name, value in squares.items()}


def merged_where_kept(linear: CollectedLinear, dtype: Dtype) -> dict[str, Tensor]:
    """Merges LoRA into a linear, and restores its zeros."""
    tensors = merged_tensors(linear, dtype)
    return tensors | {"weight": tensors["weight"] * (linear.weight != 0)}


class CutNothing(Pruner):
    """Keeps all groups: LoRA only trains."""

    def score(self, step: int) -> None:
        pass

    def cut(self, step: int, *, scored: bool = True) -> Cut | None:
        return None
