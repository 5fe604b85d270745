"""Plans the whole reshard of a cut without weights, for all ranks at once. Checks that all ranks agree."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.errors import RunError
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.traffic import layer_cuts
from loraprune_ds.zero.flat import AxisCut, Owners, partition_numel

MASKS = ("random", "adversarial", "real-looking")


@dataclass(frozen=True)
class Repartition:
    """Holds the bytes of one cut.

    Attributes:
        sent, received: (world_size,) bytes of every rank: weights, LoRA copies, fp32 masters and moments of all layers.
        shard: (world_size,) bytes that every rank held of what is cut, without padding.
        gathered: bytes that a rank would send if every tensor of the cut were all-gathered, cut, and split again.
    """

    sent: Tensor
    received: Tensor
    shard: Tensor
    gathered: int


def plan_repartition(
    shape: ModelShape, keep: list[LayerKeep], world_size: int, *, lora_rank: int, element_size: int
) -> Repartition:
    """Plans every tensor of every layer as each rank would, and checks that the plans fit together.

    Raises:
        RunError: a rank sends what another does not expect, or an element is lost. Names layer and tensor.
    """
    sent, received, shard = (torch.zeros(world_size, dtype=torch.int64) for _ in range(3))
    gathered = 0
    for index, layer_keep in enumerate(keep):
        moves: dict[tuple[tuple[int, ...], int, int], _Moves] = {}
        for cut, size in layer_cuts(shape, index, layer_keep, lora_rank, element_size):
            key = (cut.shape, cut.axis, len(cut.keep))
            if key not in moves:  # q, k, v alike, and gate and up
                moves[key] = _plan_tensor(cut, world_size, f"layer {index} {list(cut.shape)}")
            sent += moves[key].sent * size
            received += moves[key].received * size
            shard += moves[key].shard * size
            gathered += partition_numel(cut.shape[0] * cut.columns, world_size) * (world_size - 1) * size
    return Repartition(sent, received, shard, gathered)


@dataclass(frozen=True)
class _Moves:
    sent: Tensor
    received: Tensor
    shard: Tensor


def _plan_tensor(cut: AxisCut, world_size: int, name: str) -> _Moves:
    """Returns elements sent, received and held of one tensor, (world_size,) each."""
    owners, ranks = Owners(cut, world_size), torch.arange(world_size)
    sends, receives = owners.sent_by(ranks), owners.received_by(ranks)
    numel = cut.shape[0] * cut.columns
    shards = (torch.arange(world_size + 1) * partition_numel(numel, world_size)).clamp(max=numel).diff()
    if not torch.equal(sends, receives.T):
        rank = int((sends != receives.T).any(1).nonzero()[0])
        raise RunError(f"{name}: rank {rank} sends what others do not expect")
    if not torch.equal(receives.sum(1), owners.new.diff()) or (sends.sum(1) > shards).any():
        raise RunError(f"{name}: the new pieces are not filled exactly")
    own = sends.diagonal()
    return _Moves(sends.sum(1) - own, receives.sum(1) - own, shards)


def example_masks(before: ModelShape, after: ModelShape, kind: str, seed: int) -> list[LayerKeep]:
    """Returns the groups that stay in every layer, of one of three sorts.

    random: any.
    adversarial: all removed groups are at the front, so all others change their place.
    real-looking: by scores with heavy tails that are alike among neighbours, as measured scores are.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = []
    for old, new in zip(before.layers, after.layers, strict=True):
        keep.append(LayerKeep({k: _choose(old[k], new[k], kind, generator) for k in before.kinds}))
    return keep


def _choose(count: int, left: int, kind: str, generator: torch.Generator) -> Tensor:
    if kind == "adversarial":
        return torch.arange(count - left, count)
    scores = torch.rand(count, generator=generator)
    if kind == "real-looking":
        noise = torch.randn(2, 1, count, generator=generator)
        smooth = torch.nn.functional.avg_pool1d(noise[:1], 9, 1, 4, count_include_pad=False)
        scores = (0.5 * noise[1, 0] + 2 * smooth[0, 0]).exp()
    return scores.topk(left).indices.sort().values
