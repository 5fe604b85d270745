"""One optimizer step on the global batch, with scoring and, when it is due, a cut."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from loraprune_ds.config import RunConfig
from loraprune_ds.faults import fail_point
from loraprune_ds.model.distillation import Distillation
from loraprune_ds.pruning.step import Cut, Pruner
from loraprune_ds.train.data import SampleOrder, Samples, rank_micro_batches, supervised_tokens
from loraprune_ds.train.records import CutRecord, StepRecord
from loraprune_ds.train.seeding import seed_draws
from loraprune_ds.train.teacher import Teacher
from loraprune_ds.zero.loss_scale import decide
from loraprune_ds.zero.memory import resident_bytes, storage_bytes, weight_tensors
from loraprune_ds.zero.sharded import ShardedStore


@dataclass(frozen=True)
class _RankReport:
    """What each rank says of a step, in one collective."""

    loss: list[float]
    bad_layer: list[int | None]
    resident_bytes: list[int]
    request: int


class Trainer:
    """Trains LoRA on the sharded model while the pruner watches."""

    def __init__(
        self,
        store: ShardedStore,
        pruner: Pruner,
        samples: Samples,
        order: SampleOrder,
        config: RunConfig,
        pending: Callable[[], int] = lambda: 0,
        teacher: Teacher | None = None,
    ) -> None:
        self.store = store
        self.pruner = pruner
        self.samples = samples
        self.order = order
        self.config = config
        self.weight_bytes = self._weight_bytes()
        self.requested = 0  # the largest request of any rank at the last step (stop.py)
        self._pending = pending
        self._teacher = teacher
        self._scored = False  # the last step

    def step(self, step: int) -> StepRecord:
        """The `step`-th optimizer step (from 1): forward and backward of this rank's micro-batches, score, update."""
        began = time.perf_counter()
        batch = self.order.batch(step - 1)
        supervised = supervised_tokens(self.samples, batch)
        learning_rate = self.store.learning_rate
        sparsity = self.pruner.reached()
        tokens = self.samples.count_tokens(batch)
        with self.pruner.watching(step, tokens):
            report = self._exchange(self._accumulate(step, batch, supervised))
            self.requested = report.request
            decision = decide(report.bad_layer, report.loss, dtype=self.config.model.dtype, step=step)
            self._scored = decision == "update"
            if self._scored:
                self.pruner.observe(step)
        norm = self.store.update(skipped=decision == "skip")
        seconds = time.perf_counter() - began
        return StepRecord(
            step=step,
            loss=sum(report.loss) / supervised,
            learning_rate=learning_rate,
            grad_norm=norm,
            sparsity=sparsity,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            weight_bytes=self.weight_bytes,
            resident_bytes=report.resident_bytes,
            skipped=decision == "skip",
        )

    def cut(self, step: int) -> CutRecord | None:
        """Shrinks the model if the schedule says so."""
        before = self.weight_bytes
        cut = self.pruner.cut(step, scored=self._scored)
        if cut is None:
            return None
        self.weight_bytes = self._weight_bytes()
        return self._cut_record(cut, before)

    def _accumulate(self, step: int, batch: torch.Tensor, supervised: int) -> float:
        """Forward and backward of this rank's micro-batches; returns its part of the sum of token losses.

        ZeRO-3 averages gradients over the ranks, so the loss is scaled by W to make their sum that of the batch.
        """
        total = 0.0
        store = self.store
        micro_batches = rank_micro_batches(batch, self.config.train.micro_batch_size, store.rank, store.world_size)
        for i, indices in enumerate(micro_batches):
            seed_draws(self.config.seed, step, i, store.rank)
            input_ids = self.samples.input_ids[indices].long().to(store.device)
            labels = self.samples.labels[indices].long().to(store.device)
            with self.pruner.measuring(self.samples.real_tokens(indices)):
                loss = store.forward(input_ids=input_ids, labels=labels, **self._mixed_with(indices)).sum()
            fail_point("forward")
            total += loss.item()
            store.backward(loss * (store.world_size / supervised))
            fail_point("backward")
            del loss  # a live graph remembers the shapes before a cut
            if i < len(micro_batches) - 1:
                store.end_micro_batch()
        return total

    def _mixed_with(self, indices: torch.Tensor) -> dict[str, Distillation]:
        """What the loss of these samples takes besides their labels."""
        if self._teacher is None:
            return {}
        return {"distillation": self._teacher.distillation(indices, self.store.device)}

    def _exchange(self, loss: float) -> _RankReport:
        bad = self.store.nonfinite_layer() if math.isfinite(loss) else self.store.nonfinite_weights()
        mine = torch.tensor([loss, -1 if bad is None else bad, resident_bytes(), self._pending()], dtype=torch.float64)
        rows = self.store.comm.all_gather(mine.to(self.store.device)).tolist()
        return _RankReport(
            loss=[row[0] for row in rows],
            bad_layer=[None if row[1] < 0 else int(row[1]) for row in rows],
            resident_bytes=[int(row[2]) for row in rows],
            request=int(max(row[3] for row in rows)),
        )

    def _weight_bytes(self) -> list[int]:
        return self.store.gather_values(storage_bytes(weight_tensors(self.store.engine)))

    def _cut_record(self, cut: Cut, before: list[int]) -> CutRecord:
        dense, shape = self.pruner.limits.dense, self.store.shape
        return CutRecord(
            step=cut.step,
            target=cut.target,
            reached=cut.reached,
            removed_fraction=1 - shape.total_numel() / dense.total_numel(),
            seconds=cut.seconds,
            bytes_sent=sum(self.store.gather_values(cut.bytes_sent)),
            weight_bytes_before=before,
            weight_bytes_after=self.weight_bytes,
            heads=[layer.heads for layer in shape.layers],
            channels=[layer.channels for layer in shape.layers],
        )
