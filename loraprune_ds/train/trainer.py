"""Trains the model: an optimizer step with its scores, and the loop of steps, cuts, evaluations and checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.config import RunConfig
from loraprune_ds.engine.live import LiveTraining
from loraprune_ds.engine.training import InferenceEngine, TrainingEngine
from loraprune_ds.engines import connect
from loraprune_ds.errors import fail_point
from loraprune_ds.model.logits import Distillation
from loraprune_ds.model.perplexity import measure_perplexity
from loraprune_ds.model.token_loss import split_rows, supervised_positions
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.ranks.device import to_device
from loraprune_ds.report.records import CutRecord, EvaluationName, EvaluationRecord, Recorder
from loraprune_ds.session.joining import Beginning
from loraprune_ds.session.live import find_peft_model
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.train.checkpoints import RunContext, build_engine, save_checkpoint
from loraprune_ds.train.data.samples import SampleOrder, Samples, rank_micro_batches, seed_dropout
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.stop import NOTHING


@dataclass
class Trainer:
    """Trains LoRA by our own passes, and drives the pruning of the same model."""

    engine: TrainingEngine
    pruning: Pruning
    samples: Samples
    order: SampleOrder
    config: RunConfig
    # returns the request of this rank (stop.py)
    current_request: Callable[[], int] = lambda: NOTHING
    # A separate engine with the source's decoder, stored by `model.frozen`, in evaluation mode. It has no LoRA, is
    # never scored, cut or saved, and draws no random numbers. It needs no head, because the student's is never cut.
    teacher: InferenceEngine | None = None

    def __post_init__(self) -> None:
        self.model = self.pruning.model
        self.requested = NOTHING  # the largest request of any rank at the last step

    def train_step(self) -> CutRecord | None:
        """Makes the next optimizer step: forward and backward passes, scores, update, and a cut if one is due."""
        pruning = self.pruning
        step = pruning.step + 1
        pruning.begin_step()
        batch = self.order.batch(step - 1)
        supervised = self.samples.count_supervised(batch)
        tokens = self.samples.count_tokens(batch)
        loss = self._accumulate(step, batch, supervised)
        numbers = pruning.before_update(loss, request=self.current_request())
        self.engine.update(skipped=not pruning.scored)
        self.requested = max(numbers.requests)
        return pruning.end_step(sum(numbers.losses) / supervised, tokens=tokens)

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
            with self.pruning.record_forward(*masks):
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
        device = self.model.device
        rows = None
        if self.model.shape.family.has_encoder:
            host_rows = split_rows(**inputs)
            masks = [host_rows.source_mask, host_rows.target_mask]
            rows = host_rows._make(to_device(x, device) for x in host_rows)
        inputs["supervised"] = supervised_positions(inputs["labels"])
        inputs = {name: to_device(tensor, device) for name, tensor in inputs.items()}
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
    schedule = context.prepared.schedule
    trainer = build_trainer(
        context.prepared, context.recorder, context.checkpoint, context.requests.current
    )
    engine = trainer.engine
    pruning = trainer.pruning
    every = context.config.checkpoint.every or schedule.steps
    if not context.checkpoint:
        record_perplexity(context, engine.infer, 0, "dense")
    while pruning.step < schedule.steps:
        trainer.train_step()
        step = pruning.step
        if name := _evaluation_after(step, schedule, context.config.evaluate.every):
            record_perplexity(context, engine.infer, step, name)
        if trainer.requested != NOTHING or step % every == 0 or step == schedule.steps:
            save_checkpoint(context, engine, pruning)
        context.status.update(step)
        if context.honour(trainer.requested):
            return False
    engine.release()  # frees memory for the exported model, which is measured next
    if trainer.teacher is not None:
        trainer.teacher.release()
    return True


def build_trainer(
    prepared: Prepared,
    recorder: Recorder,
    checkpoint: TrainingCheckpoint | None = None,
    current_request: Callable[[], int] = lambda: NOTHING,
) -> Trainer:
    """Builds the trainer of a run, fresh or from the checkpoint. Arguments are as in `Trainer`. Collective."""
    config = prepared.config
    engine = build_engine(prepared, checkpoint)
    shape = (checkpoint or prepared.pretrained).shape
    peft_model = find_peft_model(engine.module)
    model = connect(LiveTraining(engine.module, peft_model, shape, engine.optimizer))
    teacher = None
    if config.train.distill_weight:
        teacher = prepared.engine.build_inference_engine(
            prepared.pretrained.with_refits("none"),
            config.model.attn_implementation,
            config.model.dtype,
            prepared.ds_config,
            head=False,
        )
    if checkpoint:
        checkpoint.restore_trained(model)
    pruning = Pruning.of_run(
        Beginning(model, prepared.schedule, config.model.dtype, prepared.origin, recorder),
        checkpoint,
    )
    return Trainer(
        engine, pruning, prepared.samples, prepared.order, config, current_request, teacher
    )


def _evaluation_after(step: int, schedule: Schedule, every: int | None) -> EvaluationName | None:
    """Names the evaluation after a step. None if the step has none."""
    if step == schedule.last_cut:
        return "after_last_cut"
    return "step" if every is not None and step % every == 0 else None


def record_perplexity(
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
