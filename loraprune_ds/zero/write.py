"""Writes a model from the ZeRO-3 ranks, W shards at a time: no rank ever holds more than one layer or the ends.

A layer is brought together linear by linear, each in the form it is written in before the next one comes. Every rank
then writes its own while the others write theirs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.errors import RunError
from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.shapes import LINEARS
from loraprune_ds.model.weight_files import (
    INDEX_FILE,
    weight_file_count,
    weight_file_name,
    write_index,
    write_weight_file,
)
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.zero.collect import collect_ends, collect_linear, collect_norms
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import owner_rounds
from loraprune_ds.zero.sharded import ShardedModel

TensorsOf = Callable[[CollectedLinear], dict[str, Tensor]]  # -> what is written of it: weight and, if any, bias


class LocalWrites:
    """What one rank writes between collectives.

    A rank that fails must not leave the others waiting in the next collective: it writes nothing more, keeps up with
    the collectives, and all ranks hear of the failure in `agree`.
    """

    def __init__(self) -> None:
        self._error: Exception | None = None

    def do(self, write: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            write()
        except (OSError, SafetensorError) as error:
            self._error = error

    def agree(self, comm: Communicator, folder: Path) -> None:
        """Collective.

        Raises:
            RunError: a write failed on some rank; the same line on all ranks.
        """

        def tell() -> None:
            if self._error is not None:
                raise RunError(f"{folder} cannot be written: {' '.join(str(self._error).split())}")

        comm.all_or_raise(tell)


def write_model(model: ShardedModel, folder: Path, dtype: str, tensors_of: TensorsOf) -> list[str]:
    """Writes all shards and their index into `folder`. Collective.

    A layer's shard is written by its owner; the ends count as one layer more.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        RunError: a rank cannot write, for example because the disk is full.
    """
    count = weight_file_count(len(model.layers))
    mine: dict[int, dict[str, int]] = {}
    writes = LocalWrites()
    for indices in owner_rounds(count, model.world_size):
        collected = {k: _file_tensors(model, k, DTYPES[dtype], tensors_of) for k in indices}
        for k, tensors in collected.items():
            if tensors:  # this rank's; the other owners write theirs at the same time
                writes.do(lambda k=k, tensors=tensors: mine.update({k: write_weight_file(folder, k, count, tensors)}))
        del collected, tensors
    writes.agree(model.comm, folder)
    entries: dict[int, dict[str, int]] = {}
    for part in model.comm.gather_objects(mine):
        entries |= part
    names = [weight_file_name(k, count) for k in mine]
    if model.rank == 0:
        writes.do(lambda: write_index(folder, [entries[k] for k in range(count)]))
        names.append(INDEX_FILE)
    writes.agree(model.comm, folder)
    return names


def _file_tensors(model: ShardedModel, k: int, dtype: torch.dtype, tensors_of: TensorsOf) -> dict[str, Tensor]:
    """On its owner, of layer k or, after the last layer, of the ends; empty elsewhere. Collective."""
    owner = model.owner(k)
    if k < len(model.layers):
        tensors = _layer_tensors(model, k, owner, tensors_of)
        others = {
            f"model.layers.{k}.{name}": tensor
            for name, tensor in collect_norms(model.layers[k], owner, model.comm).items()
        }
    else:
        tensors, others = {}, collect_ends(cast(Any, model.module).get_base_model(), owner, model.comm)
    return tensors | {name: tensor.to(dtype) for name, tensor in others.items()}


def _layer_tensors(model: ShardedModel, layer: int, owner: int, tensors_of: TensorsOf) -> dict[str, Tensor]:
    tensors = {}
    for linear in LINEARS:
        collected = collect_linear(lora_linear(model.layers[layer], linear), owner, model.comm)
        if collected is not None:
            prefix = f"model.layers.{layer}.{linear.name}."
            tensors |= {prefix + name: tensor for name, tensor in tensors_of(collected).items()}
        del collected
    return tensors


def frozen_tensors(linear: CollectedLinear) -> dict[str, Tensor]:
    """A linear as it is, LoRA left out."""
    return {"weight": linear.weight} | ({} if linear.bias is None else {"bias": linear.bias})
