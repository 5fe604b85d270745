"""A pruner's state in the checkpoints of a run and of the callback: kept groups, score averages, input moments."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.model.family_row import Kind
from loraprune_ds.model.shapes import LayerKeep
from loraprune_ds.pruning.importance import LayerScores

if TYPE_CHECKING:  # one process can read a checkpoint without DeepSpeed
    from loraprune_ds.checkpoint.save import Staging


def keep_to_lists(keep: list[LayerKeep], kinds: tuple[Kind, ...]) -> list[list[list[int]]]:
    """Returns the kept groups by layer and kind, for JSON."""
    return [[layer[kind].tolist() for kind in kinds] for layer in keep]


def keep_from_lists(lists: list[list[list[int]]], kinds: tuple[Kind, ...]) -> list[LayerKeep]:
    return [LayerKeep(zip(kinds, map(torch.LongTensor, layer), strict=True)) for layer in lists]


def write_scores(staging: "Staging", scores: list[LayerScores] | None) -> None:
    """Writes the moving averages in float64, if there are scores. On one rank."""
    if scores is not None:
        tensors = {f"{i}.{kind}": groups for i, layer in enumerate(scores) for kind, groups in layer.items()}
        staging.write(layout.SCORES_FILE, lambda path: save_file(tensors, path))


def read_scores(folder: Path, kinds: tuple[Kind, ...]) -> list[LayerScores] | None:
    path = folder / layout.SCORES_FILE
    if not path.exists():
        return None
    tensors = load_file(path)
    layers = range(len(tensors) // len(kinds))
    return [LayerScores({kind: tensors[f"{i}.{kind}"] for kind in kinds}) for i in layers]


def write_moments(staging: "Staging", layer: int, moments: dict[str, Tensor]) -> None:
    """Writes the input moments of a layer by linear, if any. On the layer's owner."""
    if moments:
        staging.write(layout.moments_file(layer), lambda path: save_on_cpu(moments, path))


def read_moments(folder: Path, layer: int) -> dict[str, Tensor]:
    path = folder / layout.moments_file(layer)
    return load_file(path) if path.exists() else {}


def save_on_cpu(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
