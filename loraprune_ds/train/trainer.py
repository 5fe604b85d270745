"""Makes one optimizer step on the global batch, with its scores and, when it is due, the cut."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.config import Dtype, TrainConfig
from loraprune_ds.faults import fail_point
from loraprune_ds.model.flops import needed_flops_per_token
from loraprune_ds.model.token_loss import supervised_positions
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.records import CutRecord, StepRecord, cut_record
from loraprune_ds.train.data.order import BatchOrder, rank_micro_batches, seed_dropout
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.stop import NOTHING
from loraprune_ds.train.teacher import Teacher
from loraprune_ds.zero.device import device_name, is_cpu, peak_flops, to_device
from loraprune_ds.zero.memory import gather_weight_bytes, reserved_bytes, resident_bytes
from loraprune_ds.zero.optimizer import decide
from loraprune_ds.zero.training_engine import TrainingEngine


@dataclass(frozen=True)
class _RankReports:
    """Holds what all ranks say of a step, each list in rank order. One collective brings it, if all is well.

    Attributes:
        losses: each rank's part of the sum of token losses.
        bad_layers: the first layer with numbers that are not finite, or None.
        resident_bytes: memory in use now.
        reserved_bytes: what the allocators hold. Empty on CPUs.
        request: the largest request of any rank (stop.py).
    """

    losses: list[float]
    bad_layers: list[int | None]
    resident_bytes: list[int]
    reserved_bytes: list[int]
    request: int


class Trainer:
    """Trains LoRA on the sharded model and calls the pruner at every step.

    Args:
        dtype: of the frozen weights.
        seed: of the dropout.
        current_request: tells what somebody asks of this rank now (stop.py).
        teacher: what is distilled from, if anything.

    Attributes:
        requested: the largest request of any rank at the last step.
        weight_bytes: of the weights that each rank holds: (world_size,).
    """

    def __init__(
        self,
        engine: TrainingEngine,
        pruner: Pruner,
        samples: Samples,
        order: BatchOrder,
        config: TrainConfig,
        *,
        dtype: Dtype,
        seed: int,
        current_request: Callable[[], int] = lambda: NOTHING,
        teacher: Teacher | None = None,
    ) -> None:
        self.engine, self.model = engine, engine.model
        self.pruner = pruner
        self.samples = samples
        self.order = order
        self.config = config
        self.requested = NOTHING
        self.weight_bytes = gather_weight_bytes(self.model)
        self._dtype: Dtype = dtype
        self._seed = seed
        self._current_request = current_request
        self._teacher = teacher
        self._scored = False  # by the last step
        self._peak_flops = peak_flops(device_name(), dtype)

    def step(self, step: int) -> StepRecord:
        """Makes an optimizer step, counted from 1: forward and backward passes, scores, update."""
        began = time.perf_counter()
        batch = self.order.batch(step - 1)
        texts, supervised = self.samples.text_lengths(batch), self.samples.count_supervised(batch)
        tokens = sum(texts)
        learning_rate, sparsity = self.engine.learning_rate, self.pruner.reached()  # before the step changes them
        flops = tokens * needed_flops_per_token(self.model.shape, sum(length**2 for length in texts) / tokens)
        with self.pruner.record_step(step):
            reports = self._exchange(self._accumulate(step, batch, supervised))
            skipped = decide(reports.bad_layers, reports.losses, dtype=self._dtype, step=step) == "skip"
            if not skipped:
                self.pruner.score(step)
        grad_norm = self.engine.update(skipped=skipped)
        self.requested, self._scored = reports.request, not skipped
        seconds = time.perf_counter() - began
        return StepRecord(
            step=step,
            loss=sum(reports.losses) / supervised,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            sparsity=sparsity,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            weight_bytes=self.weight_bytes,
            resident_bytes=reports.resident_bytes,
            skipped=skipped,
            reserved_bytes=reports.reserved_bytes,
            mfu=self._peak_flops and flops / seconds / self._peak_flops / self.model.world_size,
        )

    def cut(self, step: int) -> CutRecord | None:
        """Cuts the model if the schedule says so."""
        before = self.weight_bytes
        cut = self.pruner.cut(step, scored=self._scored)
        if cut is None:
            return None
        self.weight_bytes = gather_weight_bytes(self.model)
        return cut_record(cut, self.pruner.limits.dense, self.model, before, self.weight_bytes)

    def _accumulate(self, step: int, batch: Tensor, supervised: int) -> Tensor:
        """Makes the forward and backward passes of this rank's micro-batches.

        ZeRO-3 averages gradients over the ranks. The loss is scaled by `world_size`, so that they become those of the
        whole batch.

        Returns:
            This rank's part of the sum of token losses, on the device, in fp64.
        """
        engine, rank, world_size = self.engine, self.model.rank, self.model.world_size
        micro_batches = rank_micro_batches(batch, self.config.micro_batch_size, rank, world_size)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for number, indices in micro_batches:
            seed_dropout(self._seed, step, number)
            with self.pruner.record_forward(self.samples.attention_mask(indices)):
                loss = engine.forward(**self._inputs(indices)).sum()
            fail_point("forward")
            total += loss.detach()
            engine.backward(loss * (world_size / supervised))
            fail_point("backward")
            del loss  # a live graph remembers the shapes before a cut
            if number < micro_batches[-1][0]:
                engine.end_micro_batch()
        return total

    def _inputs(self, indices: Tensor) -> dict[str, Any]:
        """Returns what the model gets of these samples. Nothing of it waits for the device."""
        inputs: dict[str, Any] = self.samples.inputs(indices)
        inputs["supervised"] = supervised_positions(inputs["labels"])
        inputs = {name: to_device(tensor) for name, tensor in inputs.items()}
        if self._teacher is not None:
            inputs["distillation"] = self._teacher.distillation(indices, self.model.device)
        return inputs

    def _exchange(self, loss: Tensor) -> _RankReports:
        """Tells all ranks how this rank's part of the step went, and hears of theirs. Collective.

        It waits for the device once. That is the only time in a step, beside DeepSpeed and `settle_shards`.
        """
        on_host = torch.tensor([resident_bytes(), self._current_request(), reserved_bytes()], dtype=torch.float64)
        on_device = torch.stack([loss, self.model.gradient_sum().to(loss)])
        rows = self.model.comm.all_gather(torch.cat([on_device, to_device(on_host)])).tolist()
        losses = [row[0] for row in rows]
        is_finite = all(math.isfinite(number) for row in rows for number in row[:2])
        return _RankReports(
            losses=losses,
            bad_layers=[None] * len(rows) if is_finite else self._find_bad_layers(losses[self.model.rank]),
            resident_bytes=[int(row[2]) for row in rows],
            request=int(max(row[3] for row in rows)),
            reserved_bytes=[] if is_cpu() else [int(row[4]) for row in rows],
        )

    def _find_bad_layers(self, loss: float) -> list[int | None]:
        """Finds each rank's first layer with numbers that are not finite. Collective."""
        bad_layer = self.model.nonfinite_layer() if math.isfinite(loss) else self.model.nonfinite_weights()
        layers = self.model.gather_values(-1 if bad_layer is None else bad_layer)
        return [None if layer < 0 else layer for layer in layers]
