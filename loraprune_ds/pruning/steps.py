"""Exchanges how a step went between the ranks, and decides whether it counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import RunError
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.step import Cut, Pruner
from loraprune_ds.ranks.device import StepPeak, reserved_bytes, resident_bytes, to_device, trim_heap


@dataclass(frozen=True)
class RankNumbers:
    """Describes a step by a number of each rank, in rank order."""

    own: list[float]  # its part of the loss, or its tokens
    gradient_sums: list[float]
    resident_bytes: list[int]
    reserved_bytes: list[int]
    # of this step, without a refit's moments. 0 if a rank has not measured it
    peak_bytes: list[int]
    requests: list[int]  # to stop or save (stop.py)


class PruningSteps:
    """Scores and cuts after each step, for our trainer and for the callback. `dtype` is of the frozen weights."""

    def __init__(self, model: PrunableModel, pruner: Pruner, dtype: Dtype) -> None:
        # (world_size,), before the last cut
        self.weight_bytes = self.weight_bytes_before = model.weight_bytes()
        self.model = model
        self.pruner = pruner
        self._dtype: Dtype = dtype
        self.peak = StepPeak()  # of a trainer that begins it at each step
        self.scored = False  # whether the last step's gradients were finite

    def exchange(self, own: Tensor, request: int = 0) -> RankNumbers:
        """Exchanges the outcome of a step between the ranks, in one collective. Waits for the device once.

        Args:
            own: `RankNumbers.own` of this rank, fp64 and on the device.
            request: to stop or save (stop.py).
        """
        on_device = torch.stack([own, self.model.gradient_sum().to(own)])
        peak = max(0, self.peak.of_step() - self.pruner.moment_bytes())
        on_host = torch.tensor(
            [resident_bytes(), reserved_bytes(), peak, request], dtype=torch.float64
        )
        gathered = self.model.comm.all_gather(torch.cat([on_device, to_device(on_host)]))
        table = cast(list[list[float]], cast(Any, gathered).T.tolist())  # a row for each number
        own_numbers, gradient_sums, *integers = table
        return RankNumbers(own_numbers, gradient_sums, *(list(map(int, row)) for row in integers))

    def score(self, step: int, numbers: RankNumbers, losses: Sequence[float] = ()) -> None:
        """Scores the groups, unless the step must be skipped. `numbers` come from `exchange`."""
        bad_layers = self._find_bad_layers(numbers)
        self.scored = can_update(bad_layers, losses, dtype=self._dtype, step=step)
        if self.scored:
            self.pruner.score(step)

    def cut(self, step: int) -> Cut | None:
        """Cuts the model if the schedule says so."""
        cut = self.pruner.cut(step, scored=self.scored)
        if cut is not None:
            self.weight_bytes_before = self.weight_bytes
            self.weight_bytes = self.model.weight_bytes()
            trim_heap()
        return cut

    def _find_bad_layers(self, numbers: RankNumbers) -> list[int | None]:
        """Finds each rank's first layer with numbers that are not finite. Collective if some are not."""
        if all(map(math.isfinite, (*numbers.own, *numbers.gradient_sums))):
            return [None] * len(numbers.own)
        is_finite = math.isfinite(numbers.own[self.model.rank])
        find = self.model.nonfinite_layer if is_finite else self.model.nonfinite_weights
        return self.model.comm.gather_objects(find())


def can_update(
    bad_layers: list[int | None], losses: Sequence[float], *, dtype: Dtype, step: int
) -> bool:
    """Decides whether a step's gradients can be scored and applied. fp16 skips a step with overflowed gradients.

    Args:
        bad_layers: per rank, the first layer with a non-finite LoRA gradient, or with a non-finite weight if the loss
            is not finite.

    Raises:
        RunError: a loss is not finite, or a gradient is not finite in a dtype without a loss scale.
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
    if overflowed and dtype != "float16":
        layer = min(overflowed)
        raise RunError(f"step {step}: the LoRA gradient of layer {layer} is not finite; {advice}")
    return not overflowed
