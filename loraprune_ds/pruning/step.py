"""One pruning step. Read this file first.

train/trainer.py calls it:
micro-batches → engine.backward → LoRA gradients, averaged over ranks and micro-batches by ZeRO-3
    watching()   around the step's passes and its scoring: prepares what a setting asks to be measured in them
    measuring()  around each forward pass: the inputs that a refit will need           (pruning/compensate.py)
    observe()    every rank scores the flat piece of W it owns; one all-reduce of the score vectors; moving average.
                 Between the last backward and the update               (pruning/importance.py, pruning/criterion.py)
engine.step()    the optimizer's update
    cut()        at a step of the schedule: rank groups under the target (pruning/ranking.py) → agree on the mask →
                 make up for what leaves, if asked to → shrink the weights, the LoRA factors and their Adam state in
                 place                                       (zero/sharded.py, zero/reshard.py, zero/optimizer.py)
training goes on, smaller and faster
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import RunError
from loraprune_ds.faults import fail_point
from loraprune_ds.model.shapes import KINDS, ModelShape
from loraprune_ds.pruning.compensate import Compensator
from loraprune_ds.pruning.importance import LayerScores, MovingAverage, random_scores, score_groups
from loraprune_ds.pruning.limits import Limits
from loraprune_ds.pruning.ranking import rank_global, rank_uniform
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.zero.store import LayerKeep, WeightStore
from loraprune_ds.zero.weight_gradients import WeightGradients


@dataclass(frozen=True)
class Cut:
    """What a pruning step did.

    Attributes:
        target, reached: fraction of the dense decoder-layer linear parameters that should be and is gone.
        keep: per layer, the groups that stayed, as indices into the groups before this cut.
        bytes_sent: by this rank to others in the repartition.
        seconds: ranking, agreement, compensation and repartition together.
    """

    step: int
    target: float
    reached: float
    keep: list[LayerKeep]
    bytes_sent: int
    seconds: float


class Pruner:
    """Scores groups while the model trains and removes the least important ones on a schedule."""

    def __init__(self, store: WeightStore, config: PruneConfig, schedule: Schedule, limits: Limits, seed: int) -> None:
        self.store = store
        self.config = config
        self.schedule = schedule
        self.limits = limits
        self.average = MovingAverage(config.moving_average)
        self.kept = all_groups(limits.dense)  # indices into the dense model
        compensates = config.compensate != "none"
        self.compensator = Compensator(store, config, schedule, limits.open_layers) if compensates else None
        self.gradients = WeightGradients(store) if config.criterion == "gradient" else None
        self._random = random_scores(limits.dense, seed)

    @contextmanager
    def watching(self, step: int, tokens: int) -> Iterator[None]:
        """Around all passes of a step, whose global batch has so many tokens, and its `observe`."""
        if self.compensator is not None:
            self.compensator.begin(step, tokens)
        gradients = self.gradients if self.schedule.is_scored(step) else None
        with nullcontext() if gradients is None else gradients.collecting():
            yield

    def measuring(self, real: Tensor | None) -> AbstractContextManager[None]:
        """Around the forward pass of every micro-batch; `real` (batch, window) is False at padding, None without."""
        return nullcontext() if self.compensator is None else self.compensator.measuring(real)

    def observe(self, step: int) -> None:
        """Scores all groups from this step's gradients and updates the moving average, if the schedule says so."""
        if not self.schedule.is_scored(step):
            return
        fail_point("scoring")
        if self.config.criterion == "random":
            now = [scores.kept(keep) for scores, keep in zip(self._random, self.kept, strict=True)]
        else:
            now = score_groups(self.store, self.config.criterion, self.config.normalization, step, self.gradients)
        self.average.update(now)

    def cut(self, step: int, *, scored: bool = True) -> Cut | None:
        """Shrinks the model if the schedule says so.

        Args:
            scored: False where the step's gradients overflowed in fp16. The next cut then takes over this one's groups;
                the last cut, which has no next, goes by the scores from before.

        Raises:
            RunError: no score has been observed since the last cut, or a rank computed another mask.
        """
        if not self.schedule.is_cut(step) or (not scored and step < self.schedule.end):
            return None
        began = time.perf_counter()
        target = self.schedule.target(step)
        if self.average.scores is None or (scored and self.average.updates_since_cut == 0):
            raise RunError(f"step {step}: a cut is due but no score was updated since the last one")
        keep = agree(self._rank(self.average.scores, target), self.store, step)
        fail_point("cut.agreed")
        if self.compensator is not None:
            self.compensator.compensate(keep, step)
            fail_point("cut.compensated")
        sent = self.store.shrink(keep)
        self.average.shrink(keep)
        self.kept = [compose(kept, k) for kept, k in zip(self.kept, keep, strict=True)]
        return Cut(step, target, self.reached(), keep, sent, time.perf_counter() - began)

    def restore(self, kept: list[LayerKeep], scores: list[LayerScores] | None, updates_since_cut: int) -> None:
        """Goes on where a checkpoint left off."""
        self.kept = kept
        self.average.scores = scores
        self.average.updates_since_cut = updates_since_cut

    def reached(self) -> float:
        """Fraction of the dense decoder-layer linear parameters that is gone."""
        return 1 - self.store.shape.linear_numel() / self.limits.dense.linear_numel()

    def _rank(self, scores: list[LayerScores], target: float) -> list[LayerKeep]:
        shape = self.store.shape
        if self.config.ranking == "uniform":
            return rank_uniform(scores, shape, self.limits, target, self.schedule.ratio)
        return rank_global(scores, shape, self.limits, target, joint=self.config.joint_budget)


def agree(keep: list[LayerKeep], store: WeightStore, step: int) -> list[LayerKeep]:
    """Rank 0's choice on every rank, after all ranks have compared digests of their own.

    Raises:
        RunError: a rank's digest differs, on every rank; the message names it.
    """
    mask = _to_mask(keep, store.shape)
    digest = int.from_bytes(hashlib.sha256(mask.numpy().tobytes()).digest()[:7], "big")
    digests = store.gather_values(digest)
    if different := [rank for rank, value in enumerate(digests) if value != digests[0]]:
        raise RunError(f"step {step}: rank {different[0]} computed another mask than rank 0")
    return _from_mask(store.broadcast(mask), store.shape)


def all_groups(shape: ModelShape) -> list[LayerKeep]:
    """Every group of every layer."""
    return [LayerKeep(torch.arange(layer.heads), torch.arange(layer.channels)) for layer in shape.layers]


def compose(kept: LayerKeep, keep: LayerKeep) -> LayerKeep:
    """Indices into the dense model, after another cut among those that were left."""
    return LayerKeep(kept.heads[keep.heads], kept.channels[keep.channels])


def _to_mask(keep: list[LayerKeep], shape: ModelShape) -> Tensor:
    """(all groups of all layers,) uint8: layer by layer, heads then channels."""
    parts = []
    for layer_keep, layer in zip(keep, shape.layers, strict=True):
        for kind in KINDS:
            mask = torch.zeros(layer.count(kind), dtype=torch.uint8)
            mask[layer_keep.of(kind)] = 1
            parts.append(mask)
    return torch.cat(parts)


def _from_mask(mask: Tensor, shape: ModelShape) -> list[LayerKeep]:
    sizes = [layer.count(kind) for layer in shape.layers for kind in KINDS]
    indices = [part.nonzero().flatten() for part in mask.split(sizes)]
    return [LayerKeep(heads, channels) for heads, channels in zip(indices[::2], indices[1::2], strict=True)]
