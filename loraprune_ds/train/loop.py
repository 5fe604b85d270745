"""Runs the steps of a run: train, cut, evaluate, save, export, and stop on request."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.layout import RunTotals, export_folder
from loraprune_ds.checkpoint.load import read_moments
from loraprune_ds.errors import fail_point
from loraprune_ds.evaluate.perplexity import Labelled, measure_perplexity
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.model_card import ModelCard, card_of_run
from loraprune_ds.files import finite, remove_folder, staging_of
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.records import EvaluationName, EvaluationRecord
from loraprune_ds.train.checkpoints import Checkpoints, build_engine
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.stop import NOTHING, STOP
from loraprune_ds.train.trainer import Teacher, Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import merged_tensors, write_sharded_model


class TrainingLoop:
    """Owns the sharded model while it trains."""

    def __init__(self, context: RunContext) -> None:
        self._context, self.recorder, self.status = context, context.recorder, context.status
        config, prepared, checkpoint = context.config, context.prepared, context.checkpoint
        self.config, self.prepared, self._requests = config, prepared, context.requests
        self.engine = build_engine(prepared, checkpoint)
        self.model, self._teacher = self.engine.model, None
        if config.train.distill_weight and self.status.step < prepared.steps:
            self._teacher = Teacher(prepared.pretrained, config.model, config.train, prepared.ds_config)
        self._schedule = prepared.pruning.schedule
        self.pruner = Pruner(self.model, prepared.pruning, config.seed)
        if checkpoint:
            state = checkpoint.pruner_state(self.model.shape.kinds)
            self.pruner.restore(state, partial(read_moments, checkpoint.folder))
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
        self._checkpoints = Checkpoints(context, self.pruner)
        self._totals = checkpoint.state.totals if checkpoint else RunTotals()

    def run(self) -> bool:
        """Makes all remaining steps. Returns False after a request to stop, which saves a checkpoint."""
        if not self._context.checkpoint:
            self._evaluate(0, "dense")
        for step in range(self.status.step + 1, self.prepared.steps + 1):
            if self._schedule.is_size(step - 1):  # before the step, so that a resumed run makes up for it
                export_size(self._context, self.model, step - 1)
            self._step(step)
            request = self._trainer.requested
            every = self.config.checkpoint.every or self.prepared.steps
            if request != NOTHING or step % every == 0 or step == self._schedule.section(step).last:
                self._save(step)
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

    def _save(self, step: int) -> None:
        self._context.check_owner()
        self.recorder.flush()  # a checkpoint must not outlive the records of the steps before it
        self._checkpoints.save(self.engine, step, self._totals)
        self._context.check_owner()
        self._checkpoints.drop_old(self.model.comm, step)

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


def write_weights(context: RunContext, model: ShardedModel, target: Path) -> None:
    """Writes the weights with LoRA merged into the staging folder of `target`. Collective."""
    mark, dtype = context.status.mark, context.config.model.dtype

    def make_room() -> None:
        if target.exists():  # from a process that was killed before its report
            shutil.rmtree(target)
        begin(target, mark)

    model.comm.on_rank_0(make_room)
    tower, staging = context.prepared.pretrained.tower, staging_of(target, mark)
    write_sharded_model(model, staging, dtype, lambda linear: merged_tensors(linear, dtype), tower=tower)


def exported_config(context: RunContext, pruned: ModelShape) -> ExportedConfig:
    """Makes the config of a model that the run exports."""
    dense = context.prepared.pretrained
    return export_config(dense.config, pruned, context.config.model.dtype, dense.tower and dense.tower.config)


def export_size(context: RunContext, model: ShardedModel, step: int) -> None:
    """Exports the model of a size that ends at `step`, unless an earlier start did. Collective."""
    mark, dense = context.status.mark, context.prepared.pretrained
    target = context.folder / export_folder(context.prepared.pruning.schedule.ends(), step)
    if model.comm.gather_objects(target.exists())[0]:
        return
    context.recorder.show(f"writing {target.name}/")
    write_weights(context, model, target)
    exported, card = exported_config(context, model.shape), make_card(context, model.shape, step, "size")
    context.check_owner()

    def publish_size() -> None:
        finish_folder(staging_of(target, mark), exported, dense.folder, card)
        fail_point("size.before_rename")
        publish(target, mark)
        fail_point("size.after_rename")

    model.comm.on_rank_0(publish_size)


def take_over_sizes(folder: Path, ends: Mapping[int, str], first: int) -> list[str]:
    """Removes models of later sizes that an earlier start left. Returns lines about these and about missing ones.

    Args:
        first: the step that this start goes on from.
    """
    lines = list[str]()
    for step, target in ((step, folder / export_folder(ends, step)) for step in ends if step != max(ends)):
        if step > first and target.exists():
            remove_folder(target)
            lines.append(f"{target.name}/ of an earlier start is removed; this one makes it after step {step}")
        elif step < first and not target.exists():
            over = f"this start makes none, because it goes on from step {first}"
            lines.append(f"{target} is missing: {over}; launch/export.py makes it of a checkpoint of step {step}")
    return lines


def make_card(context: RunContext, pruned: ModelShape, step: int, measured: EvaluationName) -> ModelCard:
    """Makes an export's README, with the perplexities known so far. `measured` names the one of the export."""
    prepared, history = context.prepared, context.recorder.history
    return card_of_run(
        context.config,
        prepared.pretrained.shape,
        pruned,
        asked=prepared.pruning.schedule.section(step).ratio,
        steps=step,
        windows=sum(len(ids) for ids, _ in prepared.held_out),
        perplexity_dense=history.perplexity("dense"),
        perplexity_pruned=history.perplexity(measured),
    )
