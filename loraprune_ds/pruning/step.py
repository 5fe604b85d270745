"""One pruning step. Read this file first.

What a training does in an optimizer step (session/pruning.py), and what the pruner adds to it:

    with pruner.record_step(step):
        for each micro-batch:
            with pruner.record_forward(mask): loss = engine.module(...)     a refit keeps its ids (passes.py)
            engine.backward(loss)             `fisher` records the gradients of masks on groups (criterion.py)
        pruner.score(step)                    sums the squared gradients over the ranks, then averages the sums over
                                              steps (importance.py)
    engine.update()                           the optimizer's own step
    pruner.cut(step)                          at a step of the schedule (schedule.py): ranks the groups (ranking.py,
                                              limits.py), compares the masks of all ranks, refits the kept weights
                                              (replay.py), cuts (zero/sharded.py)

The paper's criterion `lora` records nothing. `score` gathers LoRA's gradients, which ZeRO-3 has averaged over ranks and
micro-batches, and each rank scores its shard of W (criterion.py).

    group          removed together: one key-value head with its query heads, one query head, MLP channel or expert
    kind           heads, channels or experts, depending on the model (model/groups.py)
    span           all groups of one kind along an axis of a tensor (model/groups.py)
    dense          the model before any cut
    keep           the groups that stay in this cut, as indices into the current groups
    kept_of_dense  the remaining groups, as indices into the groups of the dense model
    shard          the part of a flat tensor that one rank owns. To reshard is to exchange shards after a cut
    refit          new values for the kept weights, so that outputs change least (compensate.py)
    owner          the rank that holds the full tensors of a layer, if any
    W              the frozen weight of a linear
"""

import hashlib
import math
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.errors import RunError, fail_point
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.compensate import measured_linears
from loraprune_ds.pruning.criterion import MaskGradients
from loraprune_ds.pruning.importance import GroupSums, MovingAverage, score_groups
from loraprune_ds.pruning.layer_scores import LayerScores, flatten, random_scores
from loraprune_ds.pruning.passes import KeptPasses
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.ranking import rank
from loraprune_ds.pruning.replay import refit_by_replay
from loraprune_ds.pruning.schedule import Schedule


@dataclass(frozen=True)
class Cut:
    """Describes a cut that was made."""

    step: int
    target: float  # the fraction of the dense decoder-layer linear parameters that should be gone
    reached: float  # the fraction that is gone
    keep: list[LayerKeep]
    bytes_sent: int  # by all ranks together
    seconds: float


class Pruner:
    """Scores groups while the model trains, and removes the least important ones on a schedule."""

    def __init__(self, model: PrunableModel, schedule: Schedule, seed: int) -> None:
        config = schedule.goal.config
        limits = schedule.limits
        self.model = model
        self.schedule = schedule
        self.config = config
        self.limits = limits
        self.average = MovingAverage(config.moving_average)
        self.kept_of_dense = all_groups(limits.dense)
        # for a refit
        self.passes: KeptPasses | None = None
        if config.compensate != "none":
            self.passes = KeptPasses(model)
        self.mask_gradients = MaskGradients(model) if config.criterion == "fisher" else None
        self._random = random_scores(limits.dense, seed)
        self._unchecked: GroupSums | None = None  # of the last step

    @contextmanager
    def record_step(self, step: int) -> Generator[None]:
        """Lets hooks record for `fisher` and a refit. Open it around all passes and `score`."""
        is_scored = self.schedule.is_scored(step)
        if self.passes is not None:
            if is_scored:
                self.passes.begin_step()
            else:  # no cut is left
                self.passes.steps.clear()
        with ExitStack() as recordings:
            if self.mask_gradients is not None and is_scored:
                recordings.enter_context(self.mask_gradients.record())
            yield

    def record_forward(self, *masks: Tensor | None) -> AbstractContextManager[None]:
        """Records one micro-batch, around its forward pass alone. `masks` as in `KeptPasses.record_forward`."""
        if self.passes is None or not self.passes.steps:
            return nullcontext()
        return self.passes.record_forward(*masks)

    def note_tokens(self, tokens: int) -> None:
        """Notes how many tokens the passes of this step had on all ranks, without padding."""
        if self.passes is not None and self.passes.steps:
            linears = measured_linears(self.model.shape, self.limits.open_layers)
            widest = max((linear.inputs for _, linear in linears), default=0)
            self.passes.end_step(tokens, widest)

    def score(self, step: int) -> None:
        """Scores all groups, if due. Call it after the last backward, before gradients are clipped."""
        if not self.schedule.is_scored(step):
            return
        fail_point("scoring")
        criterion = self.config.criterion
        if criterion == "random":
            pairs = zip(self._random, self.kept_of_dense, strict=True)
            scores = [layer_scores.select(kept) for layer_scores, kept in pairs]
        else:
            self._unchecked = score_groups(self.model, criterion, step, self.mask_gradients)
            scores = self._unchecked.by_layer(self.config.normalize)
        self.average.update(scores)

    @property
    def unchecked(self) -> Tensor | None:
        """The sum of the last step's scores, on the device. None if it is known to be finite."""
        return None if self._unchecked is None else self._unchecked.total

    def check(self, total: float = math.nan) -> None:
        """Raises RunError if a score of the last step is not finite. No cut or save follows from such scores.

        Args:
            total: the number that is `unchecked`. By default it waits for the device to read it.
        """
        sums = self._unchecked
        self._unchecked = None
        if sums is not None and not math.isfinite(total):
            sums.check()

    def cut(self, step: int, *, scored: bool = True) -> Cut | None:
        """Cuts the model, if the schedule says so. Call it after each update. Returns None if no width changed.

        Args:
            scored: False if the step's gradients overflowed in fp16. Its groups then leave in the next cut.
                The last cut has no next one, so it uses the earlier scores.

        Raises:
            RunError: a score is not finite, all are zero, none was updated since the last cut, or a rank computed
                another mask.
        """
        if not self.schedule.is_cut(step):
            return None
        if not scored and step != self.schedule.last_cut:
            return None
        began = time.perf_counter()
        target = self.schedule.target(step)
        keep = self._rank(self._average(step, scored), step)
        check_same_mask(keep, self.model, step)
        if self.model.shape.after(keep).counts == self.model.shape.counts:
            return None
        fail_point("cut.agreed")
        if self.passes is not None:
            refit_by_replay(self.model, keep, self.passes.passes(), step)
            fail_point("cut.compensated")
        sent = self.model.cut(keep)
        self.average.cut(keep)
        pairs = zip(self.kept_of_dense, keep, strict=True)
        self.kept_of_dense = [kept.select(layer_keep) for kept, layer_keep in pairs]
        return Cut(step, target, self.reached(), keep, sent, time.perf_counter() - began)

    def detach(self) -> None:
        """Removes the hooks from the model. Nothing is recorded afterwards."""
        for recorder in (self.passes, self.mask_gradients):
            if recorder is not None:
                recorder.detach()

    def reached(self) -> float:
        """Returns the fraction of the dense decoder-layer linear parameters that is gone."""
        return self.limits.gone(self.model.shape)

    def _average(self, step: int, scored: bool) -> list[LayerScores]:
        scores = self.average.on_host()
        if scores is None or (scored and self.average.updates_since_cut == 0):
            raise RunError(
                f"step {step}: a cut is due but no score was updated since the last cut, as in fp16 if the "
                "gradients of every step overflow; lower train.learning_rate, or use bfloat16"
            )
        values = flatten(scores)
        self.check(float(values.sum()))
        if not values.any():
            raise RunError(
                f"step {step}: a cut is due but all scores are zero; is the model identical to its teacher?"
            )
        return [layer.of_groups() for layer in scores]

    def _rank(self, scores: list[LayerScores], step: int) -> list[LayerKeep]:
        fraction = self.schedule.fraction(step)
        return rank(scores, self.model.shape, self.schedule.goal, fraction)


def check_same_mask(keep: list[LayerKeep], model: PrunableModel, step: int) -> None:
    """Raises RunError on every rank if one is about to keep other groups than rank 0. Collective."""
    kept = [cast(Any, groups).tolist() for layer in keep for groups in layer.values()]
    rank = model.comm.differing_rank(hashlib.sha256(str(kept).encode()).digest())
    if rank is not None:
        raise RunError(
            f"step {step}: rank {rank} computed another mask than rank 0; check the hardware of that "
            "rank, then resume from the last checkpoint"
        )


def all_groups(shape: ModelShape) -> list[LayerKeep]:
    """Keeps every group of every layer."""
    return [
        LayerKeep((kind, torch.arange(count)) for kind, count in layer.items())
        for layer in shape.counts
    ]
