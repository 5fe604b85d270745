"""Writes the merged model from the ZeRO-3 ranks, shard by shard: no rank ever holds more than one layer or the ends."""

from pathlib import Path

from torch import Tensor

from loraprune_ds.export.huggingface import merge_lora
from loraprune_ds.model.shards import shard_count, write_index, write_shard
from loraprune_ds.zero.collect import CollectedLayer, collect_ends, collect_layer
from loraprune_ds.zero.device import DTYPES
from loraprune_ds.zero.sharded import ShardedStore


def write_merged_weights(store: ShardedStore, folder: Path, dtype: str) -> None:
    """Writes all shards and their index into `folder`, LoRA merged in fp32. Collective; shard k is rank k % W's."""
    layers = len(store.shape.layers)
    count = shard_count(layers)
    mine: dict[int, dict[str, int]] = {}
    for k in range(count):
        owner = k % store.world_size
        if k < layers:
            layer = collect_layer(store, k, owner)
            tensors = {} if layer is None else _merge_layer(layer, k, dtype)
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


def _merge_layer(layer: CollectedLayer, index: int, dtype: str) -> dict[str, Tensor]:
    prefix, target = f"model.layers.{index}.", DTYPES[dtype]
    tensors = {prefix + name: tensor.to(target) for name, tensor in layer.others.items()}
    for name, linear in layer.linears.items():
        merged = merge_lora(linear.weight, linear.lora_A, linear.lora_B, linear.scaling, target)
        tensors[f"{prefix}{name}.weight"] = merged
        if linear.bias is not None:
            tensors[f"{prefix}{name}.bias"] = linear.bias.to(target)
    return tensors
