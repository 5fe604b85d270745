"""The criteria `lora` and `magnitude`: element importance, summed over rows or columns of the shard that a rank owns.

Shapes: W (out_features, in_features), A (r, in_features), B (out_features, r); `scaling` s = lora_alpha / r.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard

# Elements scored at a time. On a CPU a block and its gradient estimate stay in the cache. On a GPU fewer blocks need
# fewer kernel launches, and the two fp32 copies of a block take 64 MiB.
CPU_BLOCK_NUMEL = 1 << 18
DEVICE_BLOCK_NUMEL = 1 << 23

# (rows of W in fp32, which it may overwrite; their LoRA factors) -> element importance up to its sign, in their shape.
ElementCriterion = Callable[[Tensor, LoraFactors], Tensor]


def effective_weight(weight: Tensor, factors: LoraFactors) -> Tensor:
    """Turns W into W + s·B·A in place."""
    return weight.addmm_(factors.B, factors.A, alpha=factors.scaling)


def gradient_estimate(factors: LoraFactors) -> Tensor:
    """Returns G = gB·A + B·gA − gB·gA (LoRAPrune, arXiv 2305.18403, eq. 8): the change of B·A by one unit SGD step."""
    # gB·(A − gA) + B·gA as one product of twice the rank
    return torch.cat([factors.grad_B, factors.B], 1) @ torch.cat([factors.A - factors.grad_A, factors.grad_A])


def lora(weight: Tensor, factors: LoraFactors) -> Tensor:
    """Returns G ⊙ (W + s·B·A), signed: the loss's first-order change without an element, as in the released code."""
    return gradient_estimate(factors).mul_(effective_weight(weight, factors))


# `fisher` scores masks on inputs, not elements: taps.py.
ELEMENT_CRITERIA: dict[str, ElementCriterion] = {"lora": lora, "magnitude": effective_weight}


@torch.no_grad()
def score_shard(shard: OwnedShard, factors: LoraFactors, criterion: ElementCriterion, axis: int) -> Tensor:
    """Sums the importance of the owned elements per row (axis 0) or per column (axis 1) of the full weight.

    Blocks of rows are scored in fp32 and added up in float64: (out_features,) or (in_features,). Only owned elements
    count in the first and last row, so the sums of the ranks add up to the sums of the weight.
    """
    columns = shard.shape[1]
    total = torch.zeros(shard.shape[axis], dtype=torch.float64, device=shard.flat.device)
    start, end = shard.start, shard.start + len(shard.flat)
    if start == end:
        return total
    block_numel = CPU_BLOCK_NUMEL if shard.flat.device.type == "cpu" else DEVICE_BLOCK_NUMEL
    last_row, block_rows = (end - 1) // columns + 1, max(1, block_numel // columns)
    for row in range(start // columns, last_row, block_rows):
        stop = min(row + block_rows, last_row)
        low, high = max(start, row * columns), min(end, stop * columns)  # the owned part of these rows
        head, tail = low - row * columns, stop * columns - high
        owned = shard.flat[low - start : high - start]
        # Zeros fill the first and the last row.
        stored = (pad(owned, (head, tail)) if head or tail else owned).view(-1, columns)
        factors_of_rows = replace(factors, B=factors.B[row:stop], grad_B=factors.grad_B[row:stop])
        importance = criterion(shard.decode(stored, row), factors_of_rows)
        if head or tail:
            flat = importance.view(-1)
            flat[:head] = 0
            flat[len(flat) - tail :] = 0
        sums = importance.abs_().sum(1 - axis).double()  # on a CPU a tenth of vector_norm's time
        if axis == 0:
            total[row:stop] = sums
        else:
            total += sums
    return total


def split_experts(shard: OwnedShard, factors: LoraFactors) -> Iterator[tuple[OwnedShard, LoraFactors]]:
    """Yields this rank's part of each expert's linear. A linear that is not a stack counts as one expert."""
    experts = len(factors.A) // factors.B.shape[1]
    rows, columns = shard.shape[0] // experts, shard.shape[1]
    split = (tensor.chunk(experts) for tensor in (factors.A, factors.B, factors.grad_A, factors.grad_B))
    for i, of_expert in enumerate(zip(*split, strict=True)):
        origin = shard.start - i * rows * columns  # start of the shard, counted from the first element of the expert
        low = min(max(origin, 0), rows * columns)
        high = max(low, min(origin + len(shard.flat), rows * columns))
        own = slice(low - origin, high - origin)

        def decode(stored: Tensor, first: int, above: int = i * rows) -> Tensor:
            return shard.decode(stored, above + first)

        owned = OwnedShard(shard.flat[own], low, (rows, columns), decode)
        yield owned, LoraFactors(*of_expert, scaling=factors.scaling)
