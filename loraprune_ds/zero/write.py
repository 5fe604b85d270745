"""Writes a model from the ZeRO-3 ranks. No rank ever holds more than one layer, or the embedding and head.

A layer is gathered linear by linear, and each linear is converted before the next arrives. In a round all owners write
their weight files in parallel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.config import Dtype
from loraprune_ds.errors import RunError, one_line
from loraprune_ds.model.adapters import lora_linear, plain_parameter
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.text_part import Tower, in_files
from loraprune_ds.model.weight_files import (
    INDEX_FILE,
    copy_tensors,
    weight_file_count,
    weight_file_name,
    write_index,
    write_weight_file,
)
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.zero.collect import collect_linear, collect_named
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.flat import owner_rounds
from loraprune_ds.zero.sharded import ShardedModel

TensorsOf = Callable[[CollectedLinear], dict[str, Tensor]]  # -> the tensors to write: weight and perhaps bias


class LocalWrites:
    """Makes this rank's writes into `folder` between collectives. After a failure it stops, until `agree` raises."""

    def __init__(self, comm: Communicator, folder: Path) -> None:
        self._comm, self._folder = comm, folder
        self._error: Exception | None = None

    def do(self, write: Callable[[], object]) -> None:
        if self._error is not None:
            return
        try:
            write()
        except (OSError, SafetensorError) as error:
            self._error = error

    def do_on_rank_0(self, write: Callable[[], object]) -> None:
        """Makes a write on rank 0 alone. Then raises like `agree`. Collective."""
        if self._comm.rank == 0:
            self.do(write)
        self.agree()

    def agree(self) -> None:
        """Raises the same RunError on all ranks if a write failed on one of them. Collective."""
        self._comm.all_or_raise(self._raise_own_error)

    def _raise_own_error(self) -> None:
        if self._error is not None:
            raise RunError(f"{self._folder} cannot be written: {one_line(self._error)}")


def write_sharded_model(
    model: ShardedModel,
    folder: Path,
    dtype: Dtype,
    tensors_of: TensorsOf,
    *,
    trained: bool = True,
    tower: Tower | None = None,
    export: bool = True,
) -> list[str]:
    """Writes all weight files and their index into `folder`. Returns the names of this rank's files. Collective.

    Args:
        trained: write the learned copies of PEFT's modules_to_save, not their initial values.
        tower: the tower of the model, to copy.
        export: without the copies of a bias that layers share. A checkpoint has them.
    """
    own = weight_file_count(len(model.shape.layers))
    count = own + (tower is not None)
    mine: dict[int, dict[str, int]] = {}
    writes = LocalWrites(model.comm, folder)

    def write(k: int, tensors: dict[str, Tensor]) -> dict[str, int]:
        return write_weight_file(folder, k, count, in_files(tensors, model.shape, tower, export=export))

    for indices in owner_rounds(own, model.world_size):
        collected = {k: _file_tensors(model, k, DTYPES[dtype], tensors_of, trained) for k in indices}
        for k, tensors in collected.items():
            if tensors:  # this rank owns the file. Other owners write theirs in parallel
                writes.do(lambda k=k, tensors=tensors: mine.update({k: write(k, tensors)}))
        del collected, tensors
    writes.agree()
    entries: dict[int, dict[str, int]] = {}
    for part in model.comm.gather_objects(mine):
        entries |= part
    names = [weight_file_name(k, count) for k in mine]
    if tower:
        writes.do_on_rank_0(lambda: entries.update({own: copy_tensors(tower.files, folder, own, count)}))
    writes.do_on_rank_0(lambda: write_index(folder, [entries[k] for k in range(count)]))
    return [*names, INDEX_FILE] if model.rank == 0 else names


def _file_tensors(
    model: ShardedModel, k: int, dtype: torch.dtype, tensors_of: TensorsOf, trained: bool
) -> dict[str, Tensor]:
    """Gathers file k on one rank: a layer, or embedding, norm and head. Empty elsewhere. Collective."""
    shape, owner, tensors = model.shape, model.owner(k), dict[str, Tensor]()
    if k < len(shape.layers):
        parent, prefix = model.layers[k], shape.prefix(k)
        for linear in shape.layers[k].linears:
            collected = collect_linear(lora_linear(parent, linear.linear), owner, model.comm)
            if collected is not None:
                tensors |= {f"{prefix}{linear.linear}.{name}": x for name, x in tensors_of(collected).items()}
            del collected
        others = shape.layers[k].others
    else:
        parent, prefix, others = cast(Any, model.module).get_base_model(), "", shape.outer
    keep_fp32 = {prefix + tensor.name: tensor.keep_fp32 for tensor in others}
    parameters = {prefix + x.name: plain_parameter(parent, x.name, trained=trained) for x in others}
    for name, tensor in collect_named(parameters, owner, model.comm).items():
        tensors[name] = tensor if keep_fp32[name] else tensor.to(dtype)
    return tensors


def frozen_tensors(linear: CollectedLinear) -> dict[str, Tensor]:
    """Returns the stored tensors of a linear, without LoRA."""
    return linear.stored | ({} if linear.bias is None else {"bias": linear.bias})


def merged_tensors(linear: CollectedLinear, dtype: Dtype) -> dict[str, Tensor]:
    """Merges LoRA into a collected linear."""
    target = DTYPES[dtype]
    weight = merge_lora(linear.weight, linear.lora_A, linear.lora_B, linear.scaling, target)
    return {"weight": weight} | ({} if linear.bias is None else {"bias": linear.bias.to(target)})
