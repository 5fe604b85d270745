"""Weight files that different ranks can write on their own, and the index that ties them together."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.model.shapes import Pieces

INDEX_FILE = "model.safetensors.index.json"


def weight_file_count(num_layers: int) -> int:
    """Returns how many files a model has. File k holds layer k. The last one has embedding, final norm and head."""
    return num_layers + 1


def weight_file_name(index: int, count: int) -> str:
    """Returns the Hugging Face name of file `index` (from 0) of `count`."""
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_weight_file(folder: Path, index: int, count: int, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Writes one weight file. Its tensors have Hugging Face names (`model.layers.3.mlp.up_proj.weight`).

    A tied head is the embedding, so it is not among them.

    Returns:
        Name -> bytes, the file's entry for `write_index`.
    """
    on_cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, folder / weight_file_name(index, count), metadata={"format": "pt"})
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def as_stored(tensors: Mapping[str, Tensor], stored: Mapping[str, Pieces]) -> dict[str, Tensor]:
    """Returns tensors as they are on disk. A stack of experts is one matrix for each there, or has three dimensions.

    Args:
        stored: `ModelShape.stored`.
    """
    on_disk: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        names, shape = stored.get(name, Pieces((name,), tensor.shape))
        on_disk |= zip(names, tensor.reshape(len(names), *shape), strict=True)
    return on_disk


def write_index(folder: Path, entries: list[dict[str, int]]) -> None:
    """Writes model.safetensors.index.json. `entries[k]` is what `write_weight_file` returned for file k."""
    weight_map: dict[str, str] = {}
    for index, entry in enumerate(entries):
        assert not weight_map.keys() & entry.keys(), "a tensor is in two files"
        weight_map |= dict.fromkeys(entry, weight_file_name(index, len(entries)))
    total_size = sum(sum(entry.values()) for entry in entries)
    content = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n")
