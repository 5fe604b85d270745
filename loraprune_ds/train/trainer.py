"""Trains the model: an optimizer step with its scores, and the loop of steps, cuts, evaluations and checkpoints."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.config import RunConfig
from loraprune_ds.engine.training import InferenceEngine, TrainingEngine
from loraprune_ds.errors import fail_point
from loraprune_ds.model.logits import Distillation
from loraprune_ds.model.perplexity import measure_perplexity
from loraprune_ds.model.shape import needed_flops_per_token
from loraprune_ds.model.token_loss import split_rows, supervised_positions
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.pruning.steps import PruningSteps
from loraprune_ds.ranks.device import device_name, is_cpu, peak_flops, to_device
from loraprune_ds.report.records import (
    CutRecord,
    EvaluationName,
    EvaluationRecord,
    StepRecord,
    record_cut,
)
from loraprune_ds.train.checkpoints import RunContext, build_engine, save_checkpoint
from loraprune_ds.train.data.samples import SampleOrder, Samples, rank_micro_batches, seed_dropout
from loraprune_ds.train.stop import NOTHING


@dataclass
class Trainer:
    """Trains LoRA and calls the pruner at every step."""

    engine: TrainingEngine
    pruner: Pruner
    samples: Samples
    order: SampleOrder
    config: RunConfig
    # returns the request of this rank (stop.py)
    current_request: Callable[[], int] = lambda: NOTHING
    # A separate engine with the source's decoder, stored by `model.frozen`, in evaluation mode. It has no LoRA, is
    # never scored, cut or saved, and draws no random numbers. It needs no head, because the student's is never cut.
    teacher: InferenceEngine | None = None

    def __post_init__(self) -> None:
        dtype = self.config.model.dtype
        self.model = self.engine.model
        self.requested = NOTHING  # the largest request of any rank at the last step
        self.pruning_steps = PruningSteps(self.model, self.pruner, dtype)
        self._peak_flops = peak_flops(device_name(), dtype)

    def step(self, step: int) -> StepRecord:
        """Makes an optimizer step, counted from 1: forward and backward passes, scores, update."""
        began = time.perf_counter()
        self.pruning_steps.peak.begin()
        batch = self.order.batch(step - 1)
        supervised = self.samples.count_supervised(batch)
        lengths = self.samples.text_lengths(batch)
        tokens = sum(lengths)
        mean_context = sum(length**2 for length in lengths) / tokens
        flops = tokens * needed_flops_per_token(self.model.shape, mean_context)
        # before the step changes them
        rate = self.engine.lr_scheduler.get_last_lr()[0]
        sparsity = self.pruner.reached()
        with self.pruner.record_step(step):
            loss = self._accumulate(step, batch, supervised)
            numbers = self.pruning_steps.exchange(loss, self.current_request())
            self.pruning_steps.score(step, numbers, numbers.own)
        skipped = not self.pruning_steps.scored
        self.engine.update(skipped=skipped)
        grad_norm = None
        if not skipped:
            grad_norm = self.model.gradient_norm()
        self.requested = max(numbers.requests)
        seconds = time.perf_counter() - began
        mfu = None
        if self._peak_flops is not None:
            mfu = flops / seconds / self._peak_flops / self.model.world_size
        return StepRecord(
            step=step,
            loss=sum(numbers.own) / supervised,
            learning_rate=float(rate),
            grad_norm=grad_norm,
            sparsity=sparsity,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            weight_bytes=self.pruning_steps.weight_bytes,
            resident_bytes=numbers.resident_bytes,
            skipped=skipped,
            peak_bytes=numbers.peak_bytes,
            reserved_bytes=[] if is_cpu() else numbers.reserved_bytes,
            mfu=mfu,
        )

    def cut(self, step: int) -> CutRecord | None:
        """Cuts the model if the schedule says so."""
        cut = self.pruning_steps.cut(step)
        return None if cut is None else record_cut(cut, self.pruning_steps)

    def _accumulate(self, step: int, batch: Tensor, supervised: int) -> Tensor:
        """Makes the passes of this rank's micro-batches. Returns its part of the sum of token losses, in fp64."""
        engine = self.engine
        world_size = self.model.world_size
        micro_batches = rank_micro_batches(
            batch, self.config.train.micro_batch_size, self.model.rank, world_size
        )
        last = micro_batches[-1][0]
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for number, indices in micro_batches:
            seed_dropout(self.config.seed, step, number)
            inputs, masks = self._inputs(indices)
            with self.pruner.record_forward(*masks):
                loss = engine.module(**inputs).sum()
            fail_point("forward")
            total += loss.detach()
            # Gradients are averaged over the ranks.
            engine.backward(loss * (world_size / supervised), last=number == last)
            fail_point("backward")
            del loss  # frees its graph before the next micro-batch
        return total

    def _inputs(self, indices: Tensor) -> tuple[dict[str, Any], Sequence[Tensor | None]]:
        """Copies these samples to the device without waiting for it. Also returns the masks, an encoder's first."""
        inputs: dict[str, Any] = self.samples.inputs(indices)
        masks = [self.samples.attention_mask(indices)]
        rows = None
        if self.model.shape.family.has_encoder:
            host_rows = split_rows(**inputs)
            masks = [host_rows.source_mask, host_rows.target_mask]
            rows = host_rows._make(map(to_device, host_rows))
        inputs["supervised"] = supervised_positions(inputs["labels"])
        inputs = {name: to_device(tensor) for name, tensor in inputs.items()}
        if rows is not None:
            inputs["rows"] = rows
        if self.teacher is not None:
            inputs["distillation"] = self._distillation(self.teacher, inputs)
        return inputs, masks

    @torch.no_grad()
    def _distillation(self, teacher: InferenceEngine, inputs: dict[str, Any]) -> Distillation:
        """Makes one forward pass of the teacher, for the final hidden states of the supervised tokens. Collective."""
        hidden = teacher.infer(**inputs).flatten(0, 1).index_select(0, inputs["supervised"])
        return Distillation(
            hidden, self.config.train.distill_weight, self.config.train.distill_temperature
        )


def train(context: RunContext) -> bool:
    """Makes all remaining steps, then frees the model. False after a request to stop, which saves. Collective."""
    recorder = context.recorder
    schedule = context.prepared.schedule
    trainer = _build_trainer(context)
    engine = trainer.engine
    every = context.config.checkpoint.every or schedule.steps
    if not context.checkpoint:
        evaluate(context, engine.infer, 0, "dense")
    for step in range(context.status.step + 1, schedule.steps + 1):
        recorder.write(trainer.step(step))
        if cut := trainer.cut(step):
            recorder.write(cut)
        if name := _evaluation_after(step, schedule, context.config.evaluate.every):
            evaluate(context, engine.infer, step, name)
        if trainer.requested != NOTHING or step % every == 0 or step == schedule.section(step).last:
            save_checkpoint(context, engine, trainer.pruning_steps, step)
        context.status.update(step)
        if context.honour(trainer.requested):
            return False
    engine.release()  # frees memory for the exported model, which is measured next
    if trainer.teacher is not None:
        trainer.teacher.release()
    return True


def _build_trainer(context: RunContext) -> Trainer:
    """Builds the trainer, fresh or from the checkpoint. Collective."""
    config = context.config
    prepared = context.prepared
    engine = build_engine(prepared, context.checkpoint)
    teacher = None
    if config.train.distill_weight:
        teacher = prepared.engine.build_inference_engine(
            prepared.pretrained,
            config.model.attn_implementation,
            config.model.dtype,
            prepared.ds_config,
            head=False,
        )
    pruner = Pruner(engine.model, prepared.schedule, config.seed)
    if context.checkpoint:
        context.checkpoint.restore_pruner(pruner)
    return Trainer(
        engine, pruner, prepared.samples, prepared.order, config, context.requests.current, teacher
    )


def _evaluation_after(step: int, schedule: Schedule, every: int | None) -> EvaluationName | None:
    """Names the evaluation after a step. None if the step has none."""
    if step == schedule.last_cut:
        return "after_last_cut"
    # the export of the last is measured
    if step in [section.last for section in schedule.sections[:-1]]:
        return "size"
    return "step" if every is not None and step % every == 0 else None


def evaluate(
    context: RunContext, infer: Callable[..., Any], step: int, name: EvaluationName
) -> EvaluationRecord:
    """Records held-out perplexity. Draws no random numbers and changes no training state. Collective."""
    result = measure_perplexity(
        lambda ids, labels: infer(input_ids=ids, labels=labels),
        context.prepared.held_out,
        context.comm,
    )
    record = EvaluationRecord(step, name, result.perplexity, result.tokens, result.windows)
    context.recorder.write(record)
    return record
