"""Writes a model from the ZeRO-3 ranks. No rank ever holds more than one layer or the ends.

A layer is gathered linear by linear. Each gets the form that is written before the next one comes. In a round all
owners write their weight files at the same time.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.config import Dtype
from loraprune_ds.errors import RunError
from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.weight_files import (
    INDEX_FILE,
    as_stored,
    weight_file_count,
    weight_file_name,
    write_index,
    write_weight_file,
)
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.zero.collect import collect_ends, collect_linear, collect_others
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import owner_rounds
from loraprune_ds.zero.sharded import ShardedModel

TensorsOf = Callable[[CollectedLinear], dict[str, Tensor]]  # -> the tensors to write: weight and, if any, bias


class LocalWrites:
    """Makes the writes of one rank between collectives, and remembers a failure.

    A rank that fails must not leave the others waiting in the next collective. So it writes nothing more and goes on
    with the collectives. All ranks hear of the failure in `agree`.
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

    def do_on_rank_0(self, comm: Communicator, folder: Path, write: Callable[[], object]) -> None:
        """Makes a write on rank 0 alone. Then raises as `agree`. Collective."""
        if comm.rank == 0:
            self.do(write)
        self.agree(comm, folder)

    def agree(self, comm: Communicator, folder: Path) -> None:
        """Ends the writes on all ranks, if one of them failed. Collective.

        Raises:
            RunError: a write failed on some rank. The line is the same on all ranks.
        """

        def tell() -> None:
            if self._error is not None:
                raise RunError(f"{folder} cannot be written: {' '.join(str(self._error).split())}")

        comm.all_or_raise(tell)


def write_model(
    model: ShardedModel, folder: Path, dtype: Dtype, tensors_of: TensorsOf, *, trained: bool = True
) -> list[str]:
    """Writes all weight files and their index into `folder`. Collective.

    The owner of a layer writes its file. The ends count as one layer more.

    Args:
        trained: take what PEFT's modules_to_save have learned, not what they began with.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        RunError: a rank cannot write, for example because the disk is full.
    """
    count = weight_file_count(len(model.layers))
    mine: dict[int, dict[str, int]] = {}
    writes = LocalWrites()
    for indices in owner_rounds(count, model.world_size):
        collected = {k: _file_tensors(model, k, DTYPES[dtype], tensors_of, trained) for k in indices}
        for k, tensors in collected.items():
            if tensors:  # this rank's. The other owners write theirs at the same time
                writes.do(lambda k=k, tensors=tensors: mine.update({k: write_weight_file(folder, k, count, tensors)}))
        del collected, tensors
    writes.agree(model.comm, folder)
    entries: dict[int, dict[str, int]] = {}
    for part in model.comm.gather_objects(mine):
        entries |= part
    names = [weight_file_name(k, count) for k in mine]
    writes.do_on_rank_0(model.comm, folder, lambda: write_index(folder, [entries[k] for k in range(count)]))
    return [*names, INDEX_FILE] if model.rank == 0 else names


def _file_tensors(
    model: ShardedModel, k: int, dtype: torch.dtype, tensors_of: TensorsOf, trained: bool
) -> dict[str, Tensor]:
    """Gathers layer k on its owner, or after the last layer the ends. Empty elsewhere. Collective."""
    owner = model.owner(k)
    if k < len(model.layers):
        tensors = _layer_tensors(model, k, owner, tensors_of)
        others = {
            f"model.layers.{k}.{name}": tensor
            for name, tensor in collect_others(model.layers[k], model.shape, k, owner, model.comm, trained).items()
        }
    else:
        causal_lm = cast(Any, model.module).get_base_model()
        tensors, others = {}, collect_ends(causal_lm, model.shape, owner, model.comm, trained)
    exact = model.shape.exact
    others = {name: tensor if name in exact else tensor.to(dtype) for name, tensor in others.items()}
    return as_stored(tensors | others, model.shape.stored())


def _layer_tensors(model: ShardedModel, layer: int, owner: int, tensors_of: TensorsOf) -> dict[str, Tensor]:
    tensors = {}
    for linear in model.shape.linears(layer):
        collected = collect_linear(lora_linear(model.layers[layer], linear), owner, model.comm)
        if collected is not None:
            prefix = f"model.layers.{layer}.{linear.name}."
            tensors |= {prefix + name: tensor for name, tensor in tensors_of(collected).items()}
        del collected
    return tensors


def frozen_tensors(linear: CollectedLinear) -> dict[str, Tensor]:
    """Returns the tensors of a linear as they are held, without LoRA."""
    return linear.held | ({} if linear.bias is None else {"bias": linear.bias})
