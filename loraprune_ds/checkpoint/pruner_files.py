"""The tensors of a pruner's state: the moving averages of its scores, and the input moments of each layer.

The folder of a run's step has them. So has the folder that the callback keeps beside a Trainer's checkpoint.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.model.family import KINDS
from loraprune_ds.pruning.importance import LayerScores

if TYPE_CHECKING:  # one process can read a checkpoint without DeepSpeed
    from loraprune_ds.checkpoint.staging import Staging


def write_scores(staging: "Staging", scores: list[LayerScores] | None) -> None:
    """Writes the moving averages, float64. Nothing if nothing was scored. On one rank."""
    if scores is not None:
        tensors = {f"{i}.{kind}": getattr(layer, kind) for i, layer in enumerate(scores) for kind in KINDS}
        staging.write(layout.SCORES_FILE, lambda path: save_file(tensors, path))


def read_scores(folder: Path) -> list[LayerScores] | None:
    """Reads the moving averages. None if nothing was scored."""
    path = folder / layout.SCORES_FILE
    if not path.exists():
        return None
    tensors = load_file(path)
    return [LayerScores(tensors[f"{i}.heads"], tensors[f"{i}.channels"]) for i in range(len(tensors) // 2)]


def write_moments(staging: "Staging", layer: int, moments: dict[str, Tensor]) -> None:
    """Writes the input moments of a layer, by linear. Nothing if there are none. On the layer's owner."""
    if moments:
        staging.write(layout.moments_file(layer), lambda path: save_on_cpu(moments, path))


def read_moments(folder: Path, layer: int) -> dict[str, Tensor]:
    """Reads the input moments of a layer, by linear. Empty if none were written."""
    path = folder / layout.moments_file(layer)
    return load_file(path) if path.exists() else {}


def save_on_cpu(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes tensors of any device to one file."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
