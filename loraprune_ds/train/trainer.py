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
from loraprune_ds.train.data.order import SampleOrder, rank_micro_batches, seed_dropout
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.records import CutRecord, StepRecord
from loraprune_ds.train.teacher import Teacher
from loraprune_ds.zero.loss_scale import decide
from loraprune_ds.zero.memory import resident_bytes, storage_bytes, weight_tensors
from loraprune_ds.zero.training_engine import TrainingEngine


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
        engine: TrainingEngine,
        pruner: Pruner,
        samples: Samples,
        order: SampleOrder,
        config: RunConfig,
        pending: Callable[[], int] = lambda: 0,
        teacher: Teacher | None = None,
    ) -> None:
        self.engine, self.model = engine, engine.model
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
        supervised = self.samples.count_supervised(batch)
        learning_rate = self.engine.learning_rate
        sparsity = self.pruner.reached()
        tokens = self.samples.count_tokens(batch)
        with self.pruner.record_step(step):
            report = self._exchange(self._accumulate(step, batch, supervised))
            self.requested = report.request
            decision = decide(report.bad_layer, report.loss, dtype=self.config.model.dtype, step=step)
            self._scored = decision == "update"
            if self._scored:
                self.pruner.score(step)
        norm = self.engine.update(skipped=decision == "skip")
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
        engine, model = self.engine, self.model
        micro_batches = rank_micro_batches(batch, self.config.train.micro_batch_size, model.rank, model.world_size)
        for i, indices in enumerate(micro_batches):
            seed_dropout(self.config.seed, step, i, model.rank)
            input_ids = self.samples.input_ids[indices].long().to(model.device)
            labels = self.samples.labels[indices].long().to(model.device)
            with self.pruner.record_forward(self.samples.attention_mask(indices)):
                loss = engine.forward(input_ids=input_ids, labels=labels, **self._mixed_with(indices)).sum()
            fail_point("forward")
            total += loss.item()
            engine.backward(loss * (model.world_size / supervised))
            fail_point("backward")
            del loss  # a live graph remembers the shapes before a cut
            if i < len(micro_batches) - 1:
                engine.end_micro_batch()
        return total

    def _mixed_with(self, indices: torch.Tensor) -> dict[str, Distillation]:
        """What the loss of these samples takes besides their labels."""
        if self._teacher is None:
            return {}
        return {"distillation": self._teacher.distillation(indices, self.model.device)}

    def _exchange(self, loss: float) -> _RankReport:
        bad = self.model.nonfinite_layer() if math.isfinite(loss) else self.model.nonfinite_weights()
        mine = torch.tensor([loss, -1 if bad is None else bad, resident_bytes(), self._pending()], dtype=torch.float64)
        rows = self.model.comm.all_gather(mine.to(self.model.device)).tolist()
        return _RankReport(
            loss=[row[0] for row in rows],
            bad_layer=[None if row[1] < 0 else int(row[1]) for row in rows],
            resident_bytes=[int(row[2]) for row in rows],
            request=int(max(row[3] for row in rows)),
        )

    def _weight_bytes(self) -> list[int]:
        return self.model.gather_values(storage_bytes(weight_tensors(self.model.module)))

    def _cut_record(self, cut: Cut, before: list[int]) -> CutRecord:
        dense, shape = self.pruner.limits.dense, self.model.shape
        return CutRecord(
            step=cut.step,
            target=cut.target,
            reached=cut.reached,
            removed_fraction=1 - shape.total_numel() / dense.total_numel(),
            seconds=cut.seconds,
            bytes_sent=sum(self.model.gather_values(cut.bytes_sent)),
            weight_bytes_before=before,
            weight_bytes_after=self.weight_bytes,
            heads=[layer.heads for layer in shape.layers],
            channels=[layer.channels for layer in shape.layers],
        )
