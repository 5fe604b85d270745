"""Cuts a decoder layer in place: frozen weights, biases, LoRA and its optimizer state. Shards travel by all-to-all.

Nothing is gathered. Every rank computes from the mask which of its elements go to which rank (ranks/flat.py).
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from loraprune_ds.engine.cutting import ParameterCut, cut_whole
from loraprune_ds.engine.optimizer_state import OptimizerState
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import foreach
from loraprune_ds.ranks.flat import AxisCut, ReshardPlan
from loraprune_ds.zero.params import install_shard
from loraprune_ds.zero.shards import full_shape, is_sharded

ShardCut = tuple[Tensor, ReshardPlan]  # a flat shard of that tensor, padding allowed


def cut_layer(
    cuts: Iterable[ParameterCut], comm: Communicator, state: OptimizerState | None = None
) -> None:
    """Makes the parameters of a layer smaller in place. Collective.

    Args:
        state: None before there is an engine. Then some parameters may be whole.
    """
    cuts = list(cuts)
    cut_whole(cut for cut in cuts if not is_sharded(cut[0]))
    plans = _plan([cut for cut in cuts if is_sharded(cut[0])], comm)
    carried: list[tuple[nn.Parameter, str]] = []
    state_cuts: list[ShardCut] = []
    if state:
        trained = [cut for cut in plans if cut[0].requires_grad]
        for parameter, plan in trained:
            for key in state.keys(parameter):
                carried.append((parameter, key))
                state_cuts.append((state.shard(parameter, key).to(comm.device), plan))
    new_shards = reshard(state_cuts, comm)
    shards = [
        (cast(Any, parameter).ds_tensor.detach().to(comm.device), plan) for parameter, plan in plans
    ]
    for (parameter, plan), shard in zip(plans, reshard(shards, comm), strict=True):
        install_shard(parameter, shard, plan.cut.new_shape)
    # New shards of the optimizer state go into the old slots. `ShardedState.rebuild` shortens these later.
    if state and carried:  # by now a shard is the smaller view of the old slot
        foreach._foreach_copy_([state.shard(*slot) for slot in carried], new_shards)


def _plan(cuts: list[ParameterCut], comm: Communicator) -> list[tuple[nn.Parameter, ReshardPlan]]:
    """Plans the exchange for each parameter."""
    plans: dict[tuple[tuple[int, ...], int, int], ReshardPlan] = {}
    planned: list[tuple[nn.Parameter, ReshardPlan]] = []
    for parameter, kept in cuts:
        shape = full_shape(parameter)
        key = (shape, kept.axis, id(kept.keep))
        if key not in plans:
            plans[key] = ReshardPlan(AxisCut(shape, *kept), comm.world_size, comm.rank)
        planned.append((parameter, plans[key]))
    return planned


@torch.no_grad()
def reshard(cuts: list[ShardCut], comm: Communicator) -> list[Tensor]:
    """Exchanges shards for new, padded ones, in the same order. Collective: one all-to-all per dtype.

    Beside the old shards it needs two of them: parts and the outgoing buffer, that and the incoming, that and the new.
    """
    new: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(shard.dtype for shard, _ in cuts):  # LoRA may be fp32 on a bf16 base
        same = [i for i, (shard, _) in enumerate(cuts) if shard.dtype == dtype]
        new |= zip(same, _exchange([cuts[i] for i in same], comm), strict=True)
    return [new[i] for i in range(len(cuts))]


def _exchange(cuts: list[ShardCut], comm: Communicator) -> list[Tensor]:
    """Exchanges the shards of one dtype."""
    plans = [plan for _, plan in cuts]
    send = _totals_by_rank([plan.send for plan in plans], comm.world_size)
    receive = _totals_by_rank([plan.receive for plan in plans], comm.world_size)
    incoming = comm.all_to_all(_by_destination(cuts), send, receive)
    return _by_tensor(incoming, plans)


def _totals_by_rank(counts: list[dict[int, int]], world_size: int) -> list[int]:
    """Adds up the elements of several plans for each rank."""
    return [sum(count.get(rank, 0) for count in counts) for rank in range(world_size)]


def _by_destination(cuts: list[ShardCut]) -> Tensor:
    """Orders the kept elements by destination rank, then by tensor, in one buffer."""
    parts: list[tuple[int, Tensor]] = []
    for shard, plan in cuts:
        parts += zip(plan.send, plan.take(shard).split(list(plan.send.values())), strict=True)
    parts.sort(key=lambda part: part[0])  # stable: the tensors of a rank stay in order
    return torch.cat([cuts[0][0][:0], *(part for _, part in parts)])


def _by_tensor(incoming: Tensor, plans: list[ReshardPlan]) -> list[Tensor]:
    """Makes the padded new shards from a buffer ordered by source rank, then by tensor."""
    shards = [incoming.new_empty(plan.new_partition) for plan in plans]
    rests = list(shards)  # without what has a source
    parts: list[tuple[Tensor, Tensor]] = []
    for source in sorted({source for plan in plans for source in plan.receive}):
        for i, plan in enumerate(plans):
            count = plan.receive.get(source, 0)
            parts.append((rests[i][:count], incoming[:count]))
            rests[i] = rests[i][count:]
            incoming = incoming[count:]
    if parts:
        foreach._foreach_copy_(*map(list, zip(*parts, strict=True)))
    for padding in filter(len, rests):
        padding.zero_()
    return shards
