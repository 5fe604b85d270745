"""Counts the bytes that a rank holds. Training state is counted by storages and by formula."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.device import accelerator, is_cpu
from loraprune_ds.zero.flat import layer_owner, partition_numel
from loraprune_ds.zero.sharded import ShardedModel


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Counts the bytes of the distinct storages behind some tensors. Views and aliases count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def weight_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Returns this rank's shards of all weights, frozen and LoRA."""
    return (cast(Any, p).ds_tensor for p in module.parameters())


def state_tensors(model: ShardedModel) -> Iterator[Tensor]:
    """Yields all that ZeRO-3 holds for training: shards, fp32 masters, Adam moments, gradient buffers."""
    zero = model.zero_optimizer
    yield from weight_tensors(model.module)
    for master in zero.fp32_partitioned_groups_flat:
        yield master.detach()
        yield from (v for v in zero.optimizer.state.get(master, {}).values() if v.dim())  # not Adam's step count
    yield zero.grad_partitions_flat_buffer
    yield from (bucket.buffer for bucket in zero.ipg_buckets.values())


def state_terms(
    shape: ModelShape, lora_rank: int, *, world_size: int, element_size: int, bucket_numel: int, stepped: bool
) -> dict[str, int]:
    """Computes the bytes of each part of `state_tensors(model)`, from the shapes alone.

    Of a tensor's n elements a rank has ceil(n / world_size). A LoRA factor also has an fp32 master (in an fp32 run too)
    and an fp32 gradient. Once the optimizer has stepped, it has two fp32 moments. The fp32 reduce bucket comes on top.
    """
    frozen = sum(partition_numel(math.prod(s), world_size) for s in shape.parameters().values())
    lora = sum(partition_numel(numel, world_size) for numel in shape.lora_sizes(lora_rank))
    return {
        "weights": frozen * element_size,
        "lora": lora * element_size,
        "lora_masters": lora * 4,
        "lora_moments": lora * 8 if stepped else 0,
        "lora_gradients": lora * 4,
        "reduce_bucket": bucket_numel * 4,
    }


def moment_bytes(shape: ModelShape, world_size: int, open_layers: Sequence[int], *, second: bool = True) -> list[int]:
    """Returns the bytes by rank that `prune.compensate` keeps before a cut from `shape`: fp32 moments.

    They are for o_proj and down_proj of the layers that may be cut. `least_squares` needs a matrix as wide as the
    inputs. `bias` (with `second` off) needs a vector. plan/options.py adds what is there for a while only.
    """
    power, of_ranks = 2 if second else 1, [0] * world_size
    for i in open_layers:
        for linear in shape.input_linears:
            of_ranks[layer_owner(i, world_size)] += 4 * shape.linear_shape(i, linear)[1] ** power
    return of_ranks


def resident_bytes() -> int:
    """Returns the memory that this rank uses now. On a device it is what is allocated there.

    On a CPU it is anonymous and shared pages. File-backed pages can be reclaimed and do not count. Neither does the
    process's peak. It can only grow and would hide a cut.
    """
    if not is_cpu():
        return int(accelerator().memory_allocated())
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[key].split()[0]) * 1024 for key in ("RssAnon", "RssShmem"))


def peak_bytes() -> int:
    """Returns the most memory this rank has used: the device allocator's peak, or a CPU process's resident peak."""
    if not is_cpu():
        return int(accelerator().max_memory_allocated())
    with open(f"/proc/{os.getpid()}/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmHWM"].split()[0]) * 1024
