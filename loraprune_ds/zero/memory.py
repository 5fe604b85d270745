"""Counts the bytes that a rank holds, and predicts those of the training state."""

import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from loraprune_ds.model.frozen import StoredTensor
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.device import accelerator, is_cpu
from loraprune_ds.zero.flat import partition_numel
from loraprune_ds.zero.sharded import ShardedModel


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages behind some tensors. Views and aliases count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def weight_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Returns this rank's shards of all weights, frozen and LoRA."""
    return (cast(Any, p).ds_tensor for p in module.parameters())


def second_copies(module: nn.Module) -> list[Tensor]:
    """Returns this rank's shards of hpZ's second copy, for the weights that have one."""
    copies = (cast(Any, p).ds_secondary_tensor for p in module.parameters())
    return [copy for copy in copies if copy is not None]


def gather_weight_bytes(model: ShardedModel) -> list[int]:
    """Gathers the bytes of the weights that each rank holds: (world_size,)."""
    return model.gather_values(storage_bytes(weight_tensors(model.module)))


def state_tensors(model: ShardedModel) -> Iterator[Tensor]:
    """Yields everything that ZeRO-3 holds for training: shards, fp32 masters, Adam moments, gradient buffers."""
    zero = model.zero_optimizer
    yield from weight_tensors(model.module)
    for master in zero.fp32_partitioned_groups_flat:
        yield master.detach()
        yield from (v for v in zero.optimizer.state.get(master, {}).values() if v.dim())  # not Adam's step count
    yield zero.grad_partitions_flat_buffer
    yield from (bucket.buffer for bucket in zero.ipg_buckets.values())


def state_terms(
    shape: ModelShape,
    lora_rank: int,
    stored: Collection[StoredTensor],
    *,
    world_size: int,
    element_size: int,
    bucket_numel: int,
    stepped: bool,
) -> dict[str, int]:
    """Returns the bytes of `state_tensors` by part. Masters, moments, gradients and bucket are fp32 in every run."""
    lora = sum(partition_numel(numel, world_size) for numel in shape.lora_sizes(lora_rank))
    return {
        "weights": sum(x.element_size * partition_numel(math.prod(x.shape), world_size) for x in stored),
        "lora": lora * element_size,
        "lora_masters": lora * 4,
        "lora_moments": lora * 8 if stepped else 0,
        "lora_gradients": lora * 4,
        "reduce_bucket": bucket_numel * 4,
    }


def resident_bytes() -> int:
    """Returns the device memory that is allocated now, or a CPU process's anonymous and shared pages."""
    return _process_bytes("RssAnon", "RssShmem") if is_cpu() else int(accelerator().memory_allocated())


def reserved_bytes() -> int:
    """Returns the device memory that torch's allocator holds, used or not. 0 on a CPU, where it keeps none."""
    return 0 if is_cpu() else int(accelerator().memory_reserved())


def peak_bytes() -> int:
    """Returns the most memory this rank has used: the device allocator's peak, or a CPU process's resident peak."""
    return _process_bytes("VmHWM") if is_cpu() else int(accelerator().max_memory_allocated())


def _process_bytes(*keys: str) -> int:
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[key].split()[0]) * 1024 for key in keys)
