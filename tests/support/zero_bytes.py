"""What ZeRO-3 holds on a rank and sends in a cut, for tests that count its bytes."""

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from loraprune_ds.ranks.flat import AxisCut, ReshardPlan
from loraprune_ds.zero.sharded import ShardedModel


def weight_shards(module: nn.Module) -> list[Tensor]:
    """Lists this rank's shards of all weights, frozen and LoRA."""
    return [cast(Any, parameter).ds_tensor for parameter in module.parameters()]


def second_copies(module: nn.Module) -> list[Tensor]:
    """Lists this rank's shards of hpZ's second copy, for the weights that have one."""
    copies = (cast(Any, parameter).ds_secondary_tensor for parameter in module.parameters())
    return [copy for copy in copies if copy is not None]


def state_tensors(model: ShardedModel) -> Iterator[Tensor]:
    """Yields everything that ZeRO-3 holds for training: shards, fp32 masters, Adam moments, gradient buffers."""
    zero = model.zero_optimizer
    yield from weight_shards(model.module)
    for master in zero.fp32_partitioned_groups_flat:
        yield master.detach()
        # not Adam's step count
        yield from (v for v in zero.optimizer.state.get(master, {}).values() if v.dim())
    yield zero.grad_partitions_flat_buffer
    yield from (bucket.buffer for bucket in zero.ipg_buckets.values())


def elements_sent(cut: AxisCut, world_size: int, rank: int) -> int:
    """Counts the kept elements of a rank's shard that belong to another rank after the cut."""
    send = ReshardPlan(cut, world_size, rank).send
    return sum(send.values()) - send.get(rank, 0)
