"""The merged model, written from the ZeRO-3 ranks."""

from pathlib import Path

from torch import Tensor

from loraprune_ds.export.huggingface import merge_lora
from loraprune_ds.zero.collect import CollectedLayer
from loraprune_ds.zero.device import DTYPES
from loraprune_ds.zero.sharded import ShardedStore
from loraprune_ds.zero.write import write_model


def write_merged_weights(store: ShardedStore, folder: Path, dtype: str) -> None:
    """Writes all shards and their index into `folder`, LoRA merged in fp32 and rounded once. Collective."""

    def merged(layer: CollectedLayer, prefix: str) -> dict[str, Tensor]:
        target = DTYPES[dtype]
        tensors = {prefix + name: tensor.to(target) for name, tensor in layer.others.items()}
        for name, linear in layer.linears.items():
            weight = merge_lora(linear.weight, linear.lora_A, linear.lora_B, linear.scaling, target)
            tensors[f"{prefix}{name}.weight"] = weight
            if linear.bias is not None:
                tensors[f"{prefix}{name}.bias"] = linear.bias.to(target)
        return tensors

    write_model(store, folder, dtype, merged)
