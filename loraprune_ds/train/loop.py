"""The steps of a run: train, cut, evaluate, save, and stop when asked."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.checkpoint.state import RunTotals
from loraprune_ds.config import RunConfig
from loraprune_ds.evaluate.perplexity import measure_perplexity
from loraprune_ds.files import finite
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.checkpoints import Checkpoints, build_engine
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.records import EvaluationName, EvaluationRecord
from loraprune_ds.train.stop import STOP
from loraprune_ds.train.teacher import Teacher
from loraprune_ds.train.teacher_pass import record_teacher
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import current_device


class Loop:
    """Owns the sharded model while it trains."""

    def __init__(
        self,
        config: RunConfig,
        prepared: Prepared,
        checkpoint: TrainingCheckpoint | None,
        teacher: Teacher | None,
        context: RunContext,
    ) -> None:
        self.config, self.prepared = config, prepared
        self.recorder, self.status, self._requests = context.recorder, context.status, context.requests
        self.engine = build_engine(config, prepared, checkpoint)
        self.model = self.engine.model
        self.pruner = Pruner(self.model, config.prune, prepared.schedule, prepared.limits, config.seed)
        if checkpoint:
            self.pruner.restore(checkpoint.pruner_state(), checkpoint.moments)
        self._teacher = teacher
        self._trainer = Trainer(
            self.engine, self.pruner, prepared.samples, prepared.order, config, self._requests.pending, teacher
        )
        self._checkpoints = Checkpoints(config, prepared, self.pruner, checkpoint)
        self._totals = checkpoint.state.totals if checkpoint else RunTotals()
        self.resumed_from = self._checkpoints.resumed_from

    def run(self) -> bool:
        """All steps that are left; False if it was asked to stop before the end, after a checkpoint."""
        if not self.resumed_from:
            self._evaluate(0, "dense")
        if self._teacher is not None and not self._record(self._teacher):
            self._requests.clear(STOP)
            self.recorder.note("stopped before the first step; go on with --resume auto")
            return False
        for step in range(self.status.step + 1, self.prepared.steps + 1):
            self._step(step)
            requested = self._trainer.requested
            if requested or self._save_is_due(step):
                self.recorder.flush()  # a checkpoint must not outlive the records of the steps before it
                self._checkpoints.save(self.engine, step, self._totals)
            self.status.update(step)
            if requested:
                self._requests.clear(requested)
            if requested == STOP:
                self.recorder.note(f"stopped at step {step}; go on with --resume auto")
                return False
        return True

    def _record(self, teacher: Teacher) -> bool:
        samples, pending, note = self.prepared.samples, self._requests.pending, self.recorder.note
        return record_teacher(self.engine, teacher, samples, self.config, pending=pending, note=note)

    def _step(self, step: int) -> None:
        record = self._trainer.step(step)
        self.recorder.write(record)
        self._totals = replace(self._totals, tokens=self._totals.tokens + record.tokens, perplexity=None)
        if cut := self._trainer.cut(step):
            self.recorder.write(cut)
        every = self.config.evaluate.every
        if step == self.prepared.schedule.end:
            self._evaluate(step, "after_last_cut")
        elif every is not None and step % every == 0:
            self._evaluate(step, "step")

    def _save_is_due(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return step == self.prepared.steps or (every is not None and step % every == 0)

    def _evaluate(self, step: int, name: EvaluationName) -> None:
        record = measure(self.engine.infer, self.config, self.prepared, self.model.comm, step=step, name=name)
        self.recorder.write(record)
        measured = "perplexity_dense" if name == "dense" else "perplexity"
        self._totals = replace(self._totals, **{measured: finite(record.perplexity)})


def measure(
    infer: Callable[..., Any],
    config: RunConfig,
    prepared: Prepared,
    comm: Communicator,
    *,
    step: int,
    name: EvaluationName,
) -> EvaluationRecord:
    """Held-out perplexity on all ranks, by a forward pass `infer`. Draws nothing, changes no training state."""
    result = measure_perplexity(
        lambda input_ids, labels: infer(input_ids=input_ids, labels=labels),
        prepared.windows,
        config.evaluate.batch_size,
        device=current_device(),
        rank=comm.rank,
        world_size=comm.world_size,
        sum_over_ranks=comm.all_reduce,
    )
    return EvaluationRecord(step, name, result.perplexity, result.tokens, result.windows)
