"""Runs launch/run.py with another method's score. quality.py calls it.

deepspeed --quiet --num_accelerators 1 tests/benchmarks/peer_run.py --peer wanda --config ... --set ...

Two methods score an input j of o_proj or down_proj by the weights that read it and by its size. W' is W + s·B·A. x are
the inputs of a step. A group's score is the sum over its inputs.

wanda     Σ_i |W'_ij| · ‖x_j‖₂: Wanda-sp, the structured form (Sun et al., arXiv 2306.11695; An et al., 2312.11983)
flap      Σ_i W'_ij² · var(x_j): FLAP's metric (An et al., arXiv 2312.11983)
gradient  Σ |∂L/∂W ⊙ W'| over all elements of a group, which `lora` estimates (LLM-Pruner, Ma et al., arXiv 2305.11627).
          Its gradients are whole: on one rank, in a model without experts

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
from torch import Tensor, nn

from loraprune_ds.config_types import Normalization
from loraprune_ds.errors import leave, leave_on_error
from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.pruning.criterion import ElementCriterion, Tap, effective_weight, score_shard
from loraprune_ds.pruning.importance import GroupSums, add_over_ranks
from loraprune_ds.pruning.prunable_model import LinearId, PrunableModel, hook_inputs
from loraprune_ds.pruning.step import Pruner


@dataclass(frozen=True)
class Metric:
    """Holds what a method does with each element of W', and with the number, sum and squares of each input."""

    element: ElementCriterion
    size: Callable[[Tensor, Tensor, Tensor], Tensor]


METRICS = {
    "wanda": Metric(effective_weight, lambda tokens, total, squares: squares.sqrt()),
    "flap": Metric(
        lambda weight, factors, out: effective_weight(weight, factors, out).square_(),
        lambda tokens, total, squares: (squares / tokens - (total / tokens).square()).clamp_(min=0),
    ),
}


class StepRecorder:
    """Adds up a tensor per linear over the micro-batches of one step."""

    def __init__(self) -> None:
        self._recorded: dict[LinearId, Tensor] = {}
        self._active = False

    @contextmanager
    def record(self) -> Generator[None]:
        """Records while open, around all passes of a step and the use of the results. Keeps nothing afterwards."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._recorded.clear()

    def _add(self, linear_id: LinearId, values: Tensor) -> None:
        """Adds the values of one micro-batch, and may overwrite them later."""
        if linear_id in self._recorded:
            self._recorded[linear_id].add_(values)
        else:
            self._recorded[linear_id] = values


class InputSizes(StepRecorder):
    """Adds up the inputs of a step and their squares, float64, over this rank's tokens."""

    def __init__(self, metric: Metric, model: PrunableModel) -> None:
        super().__init__()
        self._metric, self._model, self._linears = metric, model, model.shape.input_linears()
        hook_inputs(model, self._linears, self._see)

    def scores(self, step: int) -> GroupSums:
        """Scores this rank's shard of W' by the inputs of all ranks, and adds the scores up over the ranks."""
        model, factors = self._model, list(self._model.lora_factors())
        parts: list[Tensor] = []
        for layer, linear in self._linears:
            linear_id = LinearId(layer, linear.linear)
            tokens, sums = model.comm.all_reduce(self._recorded[linear_id]).tensor_split([1])
            shard = model.owned_weight(linear_id)
            columns = torch.zeros(linear.inputs, dtype=torch.float64, device=model.device)
            score_shard(columns, shard, factors[layer][linear.linear], self._metric.element, 1)
            scores = columns * self._metric.size(tokens, *sums.chunk(2))
            parts.append(scores.view(-1, linear.group_width).sum(1))
        return add_over_ranks(model, self._linears, parts, step)

    @torch.no_grad()
    def _see(self, linear_id: LinearId, inputs: Tensor) -> None:
        if self._active:
            x = inputs.detach().flatten(0, -2).double()
            self._add(linear_id, torch.cat([x.new_tensor([len(x)]), x.sum(0), x.square().sum(0)]))


class WeightGradients(StepRecorder):
    """Adds up the gradient of every frozen linear, in its own shape and fp32, over the micro-batches of a step."""

    def __init__(self, model: PrunableModel) -> None:
        super().__init__()
        self._model = model
        for layer, linear in model.shape.linears():
            module = lora_linear(model.layers[layer], linear.linear)
            module.register_forward_hook(partial(self._tap, LinearId(layer, linear.linear)))

    def scores(self, step: int) -> GroupSums:
        """Sums the elements of each group."""
        model, shape, parts = self._model, self._model.shape, list[Tensor]()
        factors = list(model.lora_factors())
        for layer, linear in shape.linears():
            linear_id = LinearId(layer, linear.linear)
            shard = model.owned_weight(linear_id)
            weight = effective_weight(
                shard.decode(shard.flat.view(shard.shape), 0), factors[layer][linear.linear]
            )
            sums = weight.mul_(self._recorded[linear_id]).abs_().sum(1 - linear.axis).double()
            of_runs = sums.split([run.size for run in linear.spans])
            parts += [
                rows.view(-1, run.width).sum(1)
                for run, rows in zip(linear.spans, of_runs, strict=True)
            ]
        return GroupSums(shape, shape.linears(), parts, step)

    def _tap(
        self, linear_id: LinearId, module: nn.Module, inputs: tuple[Tensor], output: Tensor
    ) -> Tensor | None:
        # The output of the LoRA layer has the same gradient as the part from W. That part has none in the first layer.
        return (
            Tap.apply(output, *inputs, partial(self._receive, linear_id)) if self._active else None
        )

    def _receive(self, linear_id: LinearId, gradient: Tensor, inputs: Tensor) -> None:
        self._add(linear_id, (gradient.flatten(0, -2).T @ inputs.flatten(0, -2)).float())


PEERS: dict[str, Callable[[PrunableModel], InputSizes | WeightGradients]] = {
    **{name: partial(InputSizes, metric) for name, metric in METRICS.items()},
    "gradient": WeightGradients,
}


class PeerPruner(Pruner):
    """Scores by a peer's formula. All else is the project's."""

    def __init__(self, peer: str, model: PrunableModel, *rest: Any) -> None:
        super().__init__(model, *rest)
        self._recorder = PEERS[peer](model)
        self._normalize: Normalization = self.config.normalize if peer == "gradient" else "none"

    @contextmanager
    def record_step(self, step: int) -> Generator[None]:
        with super().record_step(step), self._recorder.record():
            yield

    def score(self, step: int) -> None:
        if self.schedule.is_scored(step):
            sums = self._recorder.scores(step)
            self.average.update(sums.by_layer(self._normalize))
            self._unchecked = sums


def main() -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--peer", choices=PEERS, required=True)
    given, sys.argv[1:] = parser.parse_known_args()
    from loraprune_ds.cli import run
    from loraprune_ds.train import trainer

    cast(Any, trainer).Pruner = partial(PeerPruner, given.peer)
    return run.main()


if __name__ == "__main__":
    leave_on_error()
    leave(main())
