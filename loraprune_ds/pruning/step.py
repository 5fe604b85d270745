"""One pruning step. Read this file first.

What a trainer does in an optimizer step (train/trainer.py), and what the pruner adds to it:

    with pruner.record_step(step):            what a setting needs of this step is recorded
        for each micro-batch:
            with pruner.record_forward(mask): loss = engine.forward(...)       (pruning/input_moments.py)
            engine.backward(loss)             ZeRO-3 averages the LoRA gradients over ranks and micro-batches
        pruner.score(step)                    every rank scores the shard of W that it owns. One all-reduce adds the
                                              scores up             (pruning/importance.py, pruning/criterion.py)
    engine.update()                           the optimizer's own step
    pruner.cut(step)                          at a step of the schedule (pruning/schedule.py):
                                              rank the groups       (pruning/ranking.py, pruning/limits.py)
                                              agree on the mask     (`agree`, below)
                                              make up for the loss  (pruning/compensate.py), if asked to
                                              cut the model         (zero/sharded.py, zero/cut.py)

Words, each with one meaning everywhere:
    group       what must leave together: one key-value head with its query heads, one MLP channel, or one expert
    kind        of a group: heads, channels or experts. The family says which there are (model/family.py)
    dense       the model before any cut
    keep        the groups that stay in this cut, as indices into the groups of now
    kept_of_dense  the groups that are left, as indices into those of the dense model
    cut         to remove groups: weights, biases, LoRA, masters and Adam moments get smaller
    reshard     the exchange of shards between the ranks that a cut needs
    shard       the part of a flat tensor that one rank owns
    owner       the rank that holds whatever is kept whole of a layer
    W           the frozen weight of a linear. The number of ranks is `world_size`
"""

import hashlib
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import RunError
from loraprune_ds.faults import fail_point
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.compensate import Compensator
from loraprune_ds.pruning.importance import (
    GroupSums,
    LayerScores,
    MovingAverage,
    random_scores,
    score_groups,
)
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.mask_gradients import MaskGradients
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.ranking import rank_global, rank_uniform
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.weight_gradients import WeightGradients


@dataclass(frozen=True)
class Cut:
    """Describes a cut that was made.

    Attributes:
        target, reached: the fraction of the dense decoder-layer linear parameters that should be gone, and is.
        keep: per layer, the groups that stayed, as indices into the groups before this cut.
        bytes_sent: by this rank to others.
        seconds: of ranking, agreement, compensation and the cut itself.
    """

    step: int
    target: float
    reached: float
    keep: list[LayerKeep]
    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class PrunerState:
    """Holds all that a pruner must save to go on later, but the input moments, which their owners write.

    Attributes:
        kept_of_dense: per layer, the groups that are left, as indices into the dense model.
        scores: the moving average per layer; None if nothing was scored yet.
        updates_since_cut: how often the average was updated since the last cut.
        moment_tokens: the tokens that the input moments are sums over; 0 if there are none.
    """

    kept_of_dense: list[LayerKeep]
    scores: list[LayerScores] | None
    updates_since_cut: int
    moment_tokens: float = 0.0


class Pruner:
    """Scores groups while the model trains and removes the least important ones on a schedule."""

    def __init__(
        self, model: PrunableModel, config: PruneConfig, schedule: Schedule, limits: Limits, seed: int
    ) -> None:
        self.model = model
        self.config = config
        self.schedule = schedule
        self.limits = limits
        self.average = MovingAverage(config.moving_average)
        self.kept_of_dense = all_groups(limits.dense)
        compensates = config.compensate != "none"
        self.compensator = Compensator(model, config, schedule, limits.open_layers) if compensates else None
        self.gradients = WeightGradients(model) if config.criterion == "gradient" else None
        self.masks = MaskGradients(model) if config.criterion == "fisher" else None
        self._random = random_scores(limits.dense, seed)
        self._unchecked: GroupSums | None = None

    @contextmanager
    def record_step(self, step: int) -> Generator[None]:
        """Records what the settings need of this step. Open it around all passes of the step and its `score`."""
        with ExitStack() as recordings:
            if self.compensator is not None:
                recordings.enter_context(self.compensator.record_step(step))
            for recorder in (self.gradients, self.masks):
                if recorder is not None and self.schedule.is_scored(step):
                    recordings.enter_context(recorder.record())
            yield

    def record_forward(self, attention_mask: Tensor | None) -> AbstractContextManager[None]:
        """Records the inputs of one micro-batch. Open it around its forward pass alone.

        Args:
            attention_mask: (batch, window) bool, False at padding; None if there is no padding.
        """
        return nullcontext() if self.compensator is None else self.compensator.record_forward(attention_mask)

    def score(self, step: int) -> None:
        """Scores all groups by this step's gradients, if the schedule says so, and updates the moving average.

        Call it between the last backward pass and the update: gradients are averaged then, and not yet clipped.
        """
        if not self.schedule.is_scored(step):
            return
        fail_point("scoring")
        model, criterion = self.model, self.config.criterion
        if criterion == "random":
            now = [scores.select(keep) for scores, keep in zip(self._random, self.kept_of_dense, strict=True)]
            self.average.update(now)
            return
        sums = self.masks.scores(step) if self.masks else score_groups(model, criterion, step, self.gradients)
        self.average.update(sums.by_layer(self.config.normalization))
        self._unchecked = sums

    def cut(self, step: int, *, scored: bool = True) -> Cut | None:
        """Cuts the model, if the schedule says so. Call it after each update.

        The scores of the step are looked at here. The update has waited for the device. So that costs nothing.

        Args:
            scored: False if the step's gradients overflowed in fp16. The next cut then takes over this one's groups.
                The last cut has no next and goes by the scores from before.

        Returns:
            None if nothing was cut: no cut is due, or it would change no width.

        Raises:
            RunError: a score of the step is not finite, or none was updated since the last cut. Or a rank computed
                another mask.
        """
        if self._unchecked is not None:
            self._unchecked.check()
            self._unchecked = None
        if not self.schedule.is_cut(step) or (not scored and step < self.schedule.last_cut):
            return None
        began = time.perf_counter()
        target = self.schedule.target(step)
        average = self.average.on_host()
        if average is None or (scored and self.average.updates_since_cut == 0):
            raise RunError(f"step {step}: a cut is due but no score was updated since the last one")
        keep = agree(self._rank(average, target), self.model, step)
        if self.model.shape.after(keep).layers == self.model.shape.layers:
            return None
        fail_point("cut.agreed")
        if self.compensator is not None:
            self.compensator.compensate(keep, step)
            fail_point("cut.compensated")
        sent = self.model.cut(keep)
        self.average.cut(keep)
        self.kept_of_dense = [kept.select(k) for kept, k in zip(self.kept_of_dense, keep, strict=True)]
        return Cut(step, target, self.reached(), keep, sent, time.perf_counter() - began)

    def state(self) -> PrunerState:
        """Returns what `restore` needs to go on from here."""
        tokens = 0.0 if self.compensator is None else self.compensator.moments.tokens
        return PrunerState(self.kept_of_dense, self.average.on_host(), self.average.updates_since_cut, tokens)

    def restore(self, state: PrunerState, read_moments: Callable[[int], dict[str, Tensor]]) -> None:
        """Goes on from a saved state, on any number of ranks.

        Args:
            read_moments: layer -> its input moments by linear, as `InputMoments.of_layer` gave them to its owner.
        """
        self.kept_of_dense = state.kept_of_dense
        self.average.scores = state.scores
        self.average.updates_since_cut = state.updates_since_cut
        if self.compensator is not None:
            self.compensator.moments.restore(read_moments, state.moment_tokens)

    def reached(self) -> float:
        """Returns the fraction of the dense decoder-layer linear parameters that is gone."""
        return 1 - self.model.shape.linear_numel() / self.limits.dense.linear_numel()

    def _rank(self, scores: list[LayerScores], target: float) -> list[LayerKeep]:
        shape = self.model.shape
        if self.config.ranking == "uniform":
            return rank_uniform(scores, shape, self.limits, target, self.schedule.ratio)
        return rank_global(scores, shape, self.limits, target)


def agree(keep: list[LayerKeep], model: PrunableModel, step: int) -> list[LayerKeep]:
    """Gives every rank the choice of rank 0, after all have compared digests of their own.

    Raises:
        RunError: a rank's digest differs. It is raised on every rank and names that one.
    """
    mask = _to_mask(keep, model.shape)
    digest = int.from_bytes(hashlib.sha256(mask.numpy().tobytes()).digest()[:7], "big")
    digests = model.gather_values(digest)
    if different := [rank for rank, value in enumerate(digests) if value != digests[0]]:
        raise RunError(f"step {step}: rank {different[0]} computed another mask than rank 0")
    return _from_mask(model.broadcast(mask), model.shape)


def all_groups(shape: ModelShape) -> list[LayerKeep]:
    """Keeps every group of every layer."""
    return [LayerKeep((kind, torch.arange(count)) for kind, count in layer.items()) for layer in shape.layers]


def _to_mask(keep: list[LayerKeep], shape: ModelShape) -> Tensor:
    """Returns (all groups of all layers,) uint8: layer by layer, kind by kind."""
    parts: list[Tensor] = []
    for layer_keep, layer in zip(keep, shape.layers, strict=True):
        for kind in shape.kinds:
            mask = torch.zeros(layer[kind], dtype=torch.uint8)
            mask[layer_keep[kind]] = 1
            parts.append(mask)
    return torch.cat(parts)


def _from_mask(mask: Tensor, shape: ModelShape) -> list[LayerKeep]:
    sizes = [layer[kind] for layer in shape.layers for kind in shape.kinds]
    groups = (part.nonzero().flatten() for part in torch.split(mask, sizes))
    return [LayerKeep({kind: next(groups) for kind in shape.kinds}) for _ in shape.layers]
