"""Writes a model from the ZeRO-3 ranks, shard by shard: no rank ever holds more than one layer or the ends."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from loraprune_ds.model.shards import shard_count, write_index, write_shard
from loraprune_ds.zero.collect import CollectedLayer, collect_ends, collect_layer
from loraprune_ds.zero.device import DTYPES
from loraprune_ds.zero.sharded import ShardedStore

TensorsOf = Callable[[CollectedLayer, str], dict[str, Tensor]]  # a layer and its prefix -> tensors by checkpoint name


def write_model(store: ShardedStore, folder: Path, dtype: str, tensors_of: TensorsOf) -> None:
    """Writes all shards and their index into `folder`. Collective; shard k is rank k % W's."""
    layers = len(store.shape.layers)
    count = shard_count(layers)
    mine: dict[int, dict[str, int]] = {}
    for k in range(count):
        owner = k % store.world_size
        if k < layers:
            layer = collect_layer(store, k, owner)
            tensors = {} if layer is None else tensors_of(layer, f"model.layers.{k}.")
        else:
            tensors = {name: t.to(DTYPES[dtype]) for name, t in collect_ends(store, owner).items()}
        if tensors:
            mine[k] = write_shard(folder, k, count, tensors)
        del tensors
    entries: dict[int, dict[str, int]] = {}
    for part in store.comm.gather_objects(mine):
        entries |= part
    if store.rank == 0:
        write_index(folder, [entries[k] for k in range(count)])
    store.comm.barrier()


def frozen_tensors(layer: CollectedLayer, prefix: str) -> dict[str, Tensor]:
    """A layer as it is, LoRA left out."""
    tensors = {prefix + name: tensor for name, tensor in layer.others.items()}
    for name, linear in layer.linears.items():
        tensors[f"{prefix}{name}.weight"] = linear.weight
        if linear.bias is not None:
            tensors[f"{prefix}{name}.bias"] = linear.bias
    return tensors
