"""Exchanges how a step went between the ranks, and decides whether it counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.errors import RunError
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.ranks.device import reserved_bytes, resident_bytes, to_device


@dataclass(frozen=True)
class RankNumbers:
    """Describes a step by a number of each rank, in rank order."""

    losses: list[float]  # each rank's part of the loss. 0 if the loop does not tell it
    tokens: list[int]  # of its passes, without padding. 0 if the loop counts them itself
    gradient_norms: list[float]  # of each rank's part of the gradients
    scores: list[float]  # the sum of the scores of the step before. 0 if it is known already
    resident_bytes: list[int]
    reserved_bytes: list[int]
    # of this step. 0 if a rank has not measured it
    peak_bytes: list[int]
    requests: list[int]  # to stop or save (train/stop.py)


def exchange_numbers(
    model: PrunableModel, loss: Tensor, tokens: Tensor, scores: Tensor, *, peak: int, request: int
) -> RankNumbers:
    """Exchanges the outcome of a step in one collective. Waits for the device once.

    Args:
        loss: `RankNumbers.losses` of this rank, fp64 and on the device.
        tokens: `RankNumbers.tokens` of this rank, likewise.
        scores: `RankNumbers.scores` of this rank, likewise.
    """
    on_device = loss, model.gradient_norm().double(), scores, tokens
    on_host = torch.tensor([resident_bytes(), reserved_bytes(), peak, request], dtype=torch.float64)
    numbers = torch.cat([*(number[None] for number in on_device), to_device(on_host, model.device)])
    by_rank: Any = model.comm.all_gather(numbers)
    losses, gradient_norms, sums, *rows = by_rank.T.tolist()  # a row for each number
    integers = [list(map(int, row)) for row in rows]
    tokens_by_rank, resident, reserved, peaks, requests = integers
    return RankNumbers(
        losses=losses,
        tokens=tokens_by_rank,
        gradient_norms=gradient_norms,
        scores=sums,
        resident_bytes=resident,
        reserved_bytes=reserved,
        peak_bytes=peaks,
        requests=requests,
    )


def find_bad_layers(model: PrunableModel, numbers: RankNumbers) -> list[int | None]:
    """Finds each rank's first layer with numbers that are not finite. Collective if some are not."""
    if all(map(math.isfinite, (*numbers.losses, *numbers.gradient_norms))):
        return [None] * len(numbers.losses)
    is_finite = math.isfinite(numbers.losses[model.rank])
    find = model.nonfinite_layer if is_finite else model.nonfinite_weights
    return model.comm.gather_objects(find())


def can_update(
    bad_layers: list[int | None], losses: Sequence[float], *, skips: bool, step: int
) -> bool:
    """Decides whether a step's gradients can be scored and applied.

    Args:
        bad_layers: per rank, the first layer with a non-finite LoRA gradient, or with a non-finite weight if the loss
            is not finite.
        skips: a loss scaler leaves out the update if gradients have overflowed.

    Raises:
        RunError: a loss is not finite, or a gradient is not, and no loss scaler leaves out the update.
    """
    advice = "lower train.learning_rate, or look at the data of this step"
    bad_ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad_ranks:
        first = bad_ranks[0]
        message = f"step {step}: the loss is {losses[first]} on rank {first}"
        layers = [bad_layers[rank] for rank in bad_ranks]
        bad_weights = [layer for layer in layers if layer is not None]
        if bad_weights:
            message += f"; the weights of layer {min(bad_weights)} are not finite"
        raise RunError(f"{message}; {advice}")
    overflowed = [layer for layer in bad_layers if layer is not None]
    if overflowed and not skips:
        layer = min(overflowed)
        raise RunError(f"step {step}: the LoRA gradient of layer {layer} is not finite; {advice}")
    return not overflowed
