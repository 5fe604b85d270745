"""Makes one optimizer step on the global batch and scores the groups. Then loop.py calls `cut`."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.config import Dtype, ModelConfig, TrainConfig
from loraprune_ds.errors import fail_point
from loraprune_ds.model.logits import Distillation
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.shape import needed_flops_per_token
from loraprune_ds.model.token_loss import split_rows, supervised_positions
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.records import CutRecord, StepRecord, record_cut
from loraprune_ds.train.data.samples import BatchOrder, Samples, rank_micro_batches, seed_dropout
from loraprune_ds.train.stop import NOTHING
from loraprune_ds.zero.device import device_name, is_cpu, peak_flops, to_device
from loraprune_ds.zero.engine import TrainingEngine, build_inference_engine, release
from loraprune_ds.zero.steps import PruningSteps


class Teacher:
    """Holds the source's decoder in a separate sharded engine, stored by `model.frozen`, in evaluation mode.

    It has no LoRA, is never scored, cut or saved, and draws no random numbers. It needs no head, because the
    student's head is never cut.
    """

    def __init__(
        self, pretrained: PretrainedModel, model: ModelConfig, train: TrainConfig, ds_config: dict[str, Any]
    ) -> None:
        self.engine = build_inference_engine(pretrained, model.attn_implementation, model.dtype, ds_config, head=False)
        self._weight, self._temperature = train.distill_weight, train.distill_temperature

    @torch.no_grad()
    def distillation(self, inputs: dict[str, Any]) -> Distillation:
        """Makes one forward pass. Returns the final hidden states of the supervised tokens. Collective."""
        hidden = self.engine(**inputs).flatten(0, 1).index_select(0, inputs["supervised"])
        return Distillation(hidden, self._weight, self._temperature)

    def release(self) -> None:
        release(self.engine)


class Trainer:
    """Trains LoRA on the sharded model and calls the pruner at every step. `dtype` is of the frozen weights."""

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
        current_request: Callable[[], int] = lambda: NOTHING,  # of this rank (stop.py)
        teacher: Teacher | None = None,
    ) -> None:
        self.engine, self.model, self.pruner = engine, engine.model, pruner
        self.samples, self.order, self.config = samples, order, config
        self.requested = NOTHING  # the largest request of any rank at the last step
        self.pruning_steps = PruningSteps(self.model, pruner, dtype)
        self._seed, self._current_request, self._teacher = seed, current_request, teacher
        self._peak_flops = peak_flops(device_name(), dtype)

    def step(self, step: int) -> StepRecord:
        """Makes an optimizer step, counted from 1: forward and backward passes, scores, update."""
        began = time.perf_counter()
        batch = self.order.batch(step - 1)
        texts, supervised = self.samples.text_lengths(batch), self.samples.count_supervised(batch)
        tokens = sum(texts)
        learning_rate, sparsity = self.engine.learning_rate, self.pruner.reached()  # read before the step changes them
        flops = tokens * needed_flops_per_token(self.model.shape, sum(length**2 for length in texts) / tokens)
        with self.pruner.record_step(step):
            loss = self._accumulate(step, batch, supervised)
            numbers = self.pruning_steps.exchange(loss, self._current_request())
            self.pruning_steps.score(step, numbers, numbers.own)
        skipped = not self.pruning_steps.scored
        grad_norm = self.engine.update(skipped=skipped)
        self.requested = max(numbers.requests)
        seconds = time.perf_counter() - began
        return StepRecord(
            step=step,
            loss=sum(numbers.own) / supervised,
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            sparsity=sparsity,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            weight_bytes=self.pruning_steps.weight_bytes,
            resident_bytes=numbers.resident_bytes,
            skipped=skipped,
            reserved_bytes=[] if is_cpu() else numbers.reserved_bytes,
            mfu=self._peak_flops and flops / seconds / self._peak_flops / self.model.world_size,
        )

    def cut(self, step: int) -> CutRecord | None:
        """Cuts the model if the schedule says so."""
        cut = self.pruning_steps.cut(step)
        return cut and record_cut(cut, self.pruning_steps)

    def _accumulate(self, step: int, batch: Tensor, supervised: int) -> Tensor:
        """Makes the passes of this rank's micro-batches. Returns its part of the sum of token losses, in fp64."""
        engine, rank, world_size = self.engine, self.model.rank, self.model.world_size
        micro_batches = rank_micro_batches(batch, self.config.micro_batch_size, rank, world_size)
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for number, indices in micro_batches:
            seed_dropout(self._seed, step, number)
            inputs, masks = self._inputs(indices)
            with self.pruner.record_forward(*masks):
                loss = engine.forward(**inputs).sum()
            fail_point("forward")
            total += loss.detach()
            engine.backward(loss * (world_size / supervised))  # ZeRO-3 averages gradients over the ranks
            fail_point("backward")
            del loss  # a live graph would keep the shapes from before a cut
            if number < micro_batches[-1][0]:
                engine.end_micro_batch()
        return total

    def _inputs(self, indices: Tensor) -> tuple[dict[str, Any], Sequence[Tensor | None]]:
        """Copies these samples to the device without waiting for it. Also returns the masks, an encoder's first."""
        inputs: dict[str, Any] = self.samples.inputs(indices)
        rows = split_rows(**inputs) if self.model.shape.family.has_encoder else None
        inputs["supervised"] = supervised_positions(inputs["labels"])
        inputs = {name: to_device(tensor) for name, tensor in inputs.items()}
        masks = [self.samples.attention_mask(indices)]
        if rows is not None:
            inputs["rows"], masks = rows._make(map(to_device, rows)), [rows.source_mask, rows.target_mask]
        if self._teacher is not None:
            inputs["distillation"] = self._teacher.distillation(inputs)
        return inputs, masks
