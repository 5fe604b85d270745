"""Writes a model from the ZeRO-3 ranks, shard by shard: no rank ever holds more than one layer or the ends.

A layer is brought together linear by linear, each in the form it is written in before the next one comes.
"""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.errors import RunError
from loraprune_ds.model.shapes import LINEARS
from loraprune_ds.model.shards import INDEX_FILE, shard_count, shard_file_name, write_index, write_shard
from loraprune_ds.zero.collect import collect_ends, collect_linear, collect_norms
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import DTYPES
from loraprune_ds.zero.sharded import ShardedStore
from loraprune_ds.zero.store import CollectedLinear

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

        comm.together(tell)


def write_model(store: ShardedStore, folder: Path, dtype: str, tensors_of: TensorsOf) -> list[str]:
    """Writes all shards and their index into `folder`. Collective; shard k is rank k % W's.

    Returns:
        Names of the files that this rank wrote.

    Raises:
        RunError: a rank cannot write, for example because the disk is full.
    """
    layers = len(store.shape.layers)
    count = shard_count(layers)
    mine: dict[int, dict[str, int]] = {}
    writes = LocalWrites()
    for k in range(count):
        owner = k % store.world_size
        if k < layers:
            tensors = _layer_tensors(store, k, owner, tensors_of)
            ends = {f"model.layers.{k}.{name}": t for name, t in collect_norms(store, k, owner).items()}
        else:
            tensors, ends = {}, collect_ends(store, owner)
        tensors |= {name: tensor.to(DTYPES[dtype]) for name, tensor in ends.items()}
        del ends
        if tensors:
            writes.do(lambda k=k, tensors=tensors: mine.update({k: write_shard(folder, k, count, tensors)}))
        del tensors
    writes.agree(store.comm, folder)
    entries: dict[int, dict[str, int]] = {}
    for part in store.comm.gather_objects(mine):
        entries |= part
    names = [shard_file_name(k, count) for k in mine]
    if store.rank == 0:
        writes.do(lambda: write_index(folder, [entries[k] for k in range(count)]))
        names.append(INDEX_FILE)
    writes.agree(store.comm, folder)
    return names


def _layer_tensors(store: ShardedStore, layer: int, owner: int, tensors_of: TensorsOf) -> dict[str, Tensor]:
    tensors = {}
    for linear in LINEARS:
        collected = collect_linear(store, layer, linear, owner)
        if collected is not None:
            prefix = f"model.layers.{layer}.{linear.name}."
            tensors |= {prefix + name: tensor for name, tensor in tensors_of(collected).items()}
        del collected
    return tensors


def frozen_tensors(linear: CollectedLinear) -> dict[str, Tensor]:
    """A linear as it is, LoRA left out."""
    return {"weight": linear.weight} | ({} if linear.bias is None else {"bias": linear.bias})
