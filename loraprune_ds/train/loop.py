"""Runs the steps of a run: train, cut, evaluate, save, and stop on request."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from loraprune_ds.checkpoint.layout import RunTotals
from loraprune_ds.checkpoint.load import read_moments
from loraprune_ds.files import finite
from loraprune_ds.model.perplexity import Labelled, measure_perplexity
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.records import EvaluationName, EvaluationRecord
from loraprune_ds.train.checkpoints import build_engine, save_checkpoint
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.stop import NOTHING, STOP
from loraprune_ds.train.trainer import Teacher, Trainer
from loraprune_ds.zero.comm import Communicator


class TrainingLoop:
    """Owns the sharded model while it trains."""

    def __init__(self, context: RunContext) -> None:
        self._context, self.recorder, self.status = context, context.recorder, context.status
        config, prepared, checkpoint = context.config, context.prepared, context.checkpoint
        self.config, self.prepared, self._requests = config, prepared, context.requests
        self.engine = build_engine(prepared, checkpoint)
        self.model, self._teacher = self.engine.model, None
        if config.train.distill_weight:
            self._teacher = Teacher(prepared.pretrained, config.model, config.train, prepared.ds_config)
        self._schedule = prepared.pruning.schedule
        self.pruner = Pruner(self.model, prepared.pruning, config.seed)
        if checkpoint:
            state = checkpoint.pruner_state(self.model.shape.kinds)
            self.pruner.restore(state, partial(read_moments, checkpoint.resume_folder))
        self._trainer = Trainer(
            self.engine,
            self.pruner,
            prepared.samples,
            prepared.order,
            config.train,
            dtype=config.model.dtype,
            seed=config.seed,
            current_request=self._requests.current,
            teacher=self._teacher,
        )
        self._totals = checkpoint.state.totals if checkpoint else RunTotals()

    def run(self) -> bool:
        """Makes all remaining steps. Returns False after a request to stop, which saves a checkpoint."""
        if not self._context.checkpoint:
            self._evaluate(0, "dense")
        for step in range(self.status.step + 1, self.prepared.steps + 1):
            self._step(step)
            request = self._trainer.requested
            every = self.config.checkpoint.every or self.prepared.steps
            if request != NOTHING or step % every == 0 or step == self._schedule.section(step).last:
                save_checkpoint(self._context, self.engine, self.pruner, step, self._totals)
            self.status.update(step)
            self._requests.clear(request)
            if request == STOP:
                self.recorder.show(f"stopped at step {step}; go on with --resume auto")
                return False
        return True

    def release(self) -> None:
        """Frees the model, its optimizer and the teacher."""
        self.engine.release()
        if self._teacher:
            self._teacher.release()

    def _step(self, step: int) -> None:
        record = self._trainer.step(step)
        self.recorder.write(record)
        self._totals = replace(self._totals, tokens=self._totals.tokens + record.tokens, perplexity=None)
        if cut := self._trainer.cut(step):
            self.recorder.write(cut)
        every = self.config.evaluate.every
        if step == self._schedule.last_cut:
            self._evaluate(step, "after_last_cut")
        elif self._schedule.is_size(step):
            self._evaluate(step, "size")
        elif every is not None and step % every == 0:
            self._evaluate(step, "step")

    def _evaluate(self, step: int, name: EvaluationName) -> None:
        batches, comm = self.prepared.held_out, self.model.comm
        record = measure_held_out(self.engine.infer, batches, comm, step=step, name=name)
        self.recorder.write(record)
        measured = "perplexity_dense" if name == "dense" else "perplexity"
        self._totals = replace(self._totals, **{measured: finite(record.perplexity)})


def measure_held_out(
    infer: Callable[..., Any], batches: list[Labelled], comm: Communicator, *, step: int, name: EvaluationName
) -> EvaluationRecord:
    """Measures held-out perplexity. Draws no random numbers and changes no training state. Collective."""
    result = measure_perplexity(lambda ids, labels: infer(input_ids=ids, labels=labels), batches, comm)
    return EvaluationRecord(step, name, result.perplexity, result.tokens, result.windows)
