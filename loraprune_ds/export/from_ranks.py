"""The merged model, written from the ZeRO-3 ranks."""

from pathlib import Path

from torch import Tensor

from loraprune_ds.export.huggingface import merge_lora
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import write_model


def write_merged_weights(model: ShardedModel, folder: Path, dtype: str) -> None:
    """Writes all shards and their index into `folder`, LoRA merged in fp32 and rounded once. Collective."""

    target = DTYPES[dtype]

    def merged(linear: CollectedLinear) -> dict[str, Tensor]:
        weight = merge_lora(linear.weight, linear.lora_A, linear.lora_B, linear.scaling, target)
        return {"weight": weight} | ({} if linear.bias is None else {"bias": linear.bias.to(target)})

    write_model(model, folder, dtype, merged)
