"""Runs launch/run.py with another method's score, or with none. quality.py calls it.

deepspeed --quiet --num_accelerators 1 tests/benchmarks/peer_run.py --peer wanda --config ... --set ...

Two methods score an input j of o_proj or down_proj by the weights that read it and by its size. W' is W + s·B·A. x are
the inputs of a step. A group's score is the sum over its inputs.

wanda     Σ_i |W'_ij| · ‖x_j‖₂: Wanda-sp, the structured form (Sun et al., arXiv 2306.11695; An et al., 2312.11983)
flap      Σ_i W'_ij² · var(x_j): FLAP's metric (An et al., arXiv 2312.11983)
two-four  cuts nothing, and exports zeros where the source has them (two_four.py)

The texts that this benchmark tunes on have no padding, so every position counts.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

import argparse
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.command import leave, leave_on_error
from loraprune_ds.pruning.criterion import effective_weight, magnitude, score_shard
from loraprune_ds.pruning.importance import add_over_ranks
from loraprune_ds.pruning.prunable_model import LinearId, LoraFactors, PrunableModel
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.pruning.taps import StepRecorder, hook_inputs
from tests.benchmarks.two_four import CutNothing, merged_where_kept


def squared(weight: Tensor, factors: LoraFactors) -> Tensor:
    return effective_weight(weight, factors).square_()


def norm(tokens: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    return squares.sqrt()


def variance(tokens: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    return (squares / tokens - (total / tokens).square()).clamp_(min=0)


@dataclass(frozen=True)
class Metric:
    """Holds what a method does with each element of W', and with the number, sum and squares of each input."""

    element: Callable[[Tensor, LoraFactors], Tensor]
    size: Callable[[Tensor, Tensor, Tensor], Tensor]


METRICS = {"wanda": Metric(magnitude, norm), "flap": Metric(squared, variance)}


class InputSizes(StepRecorder):
    """Adds up the inputs of a step and their squares, float64, over this rank's tokens."""

    def __init__(self, model: PrunableModel) -> None:
        super().__init__()
        self.linear_ids = model.shape.input_linear_ids()
        hook_inputs(model, self.linear_ids, self._see)

    def of(self, linear_id: LinearId) -> Tensor:
        """Returns (1 + 2 · in_features,): tokens, sums, squares."""
        return self._recorded[linear_id]

    @torch.no_grad()
    def _see(self, linear_id: LinearId, inputs: Tensor) -> None:
        if self._active:
            x = inputs.detach().flatten(0, -2).double()
            self._add(linear_id, torch.cat([x.new_tensor([len(x)]), x.sum(0), x.square().sum(0)]))


class PeerPruner(Pruner):
    """Scores by a peer's formula. All else is the project's."""

    def __init__(self, metric: Metric, model: PrunableModel, *rest: Any) -> None:
        super().__init__(model, *rest)
        self.metric, self.sizes = metric, InputSizes(model)

    @contextmanager
    def record_step(self, step: int) -> Generator[None]:
        with super().record_step(step), self.sizes.record():
            yield

    def score(self, step: int) -> None:
        if self.schedule.is_scored(step):
            sums = add_over_ranks(self.model, self.model.shape.input_linear_ids(), self._scores(), step)
            self.average.update(sums.by_layer("none"))
            self._unchecked = sums

    def _scores(self) -> list[Tensor]:
        """Returns this rank's part of every group's score: its shard of W', and the inputs of all ranks."""
        factors = list(self.model.lora_factors())
        parts: list[Tensor] = []
        for linear_id in self.sizes.linear_ids:
            layer, linear = linear_id
            tokens, sums = self.model.sum_over_ranks(self.sizes.of(linear_id)).tensor_split([1])
            shard = self.model.owned_weight(layer, linear)
            columns = score_shard(shard, factors[layer][linear.name], self.metric.element, axis=1)
            scores = columns * self.metric.size(tokens, *sums.chunk(2))
            parts.append(scores.view(-1, self.model.shape.group_width(linear)).sum(1))
        return parts


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peer", choices=[*METRICS, "two-four"], required=True)
    given, sys.argv[1:] = parser.parse_known_args()
    from loraprune_ds.cli import run
    from loraprune_ds.train import finish, loop

    if given.peer == "two-four":
        cast(Any, loop).Pruner, cast(Any, finish).merged_tensors = CutNothing, merged_where_kept
    else:
        cast(Any, loop).Pruner = partial(PeerPruner, METRICS[given.peer])
    return run.main()


if __name__ == "__main__":
    leave_on_error()
    leave(main())
