"""Saves and resumes a run. Connects the checkpoint format with the trainer."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from loraprune_ds.checkpoint.layout import (
    CHECKPOINTS_FOLDER,
    STATE_FILE,
    RunState,
    RunTotals,
    ShapeSource,
    newest_state,
    recorded_config,
)
from loraprune_ds.checkpoint.load import (
    TrainingCheckpoint,
    find_newest,
    keep_to_lists,
    open_training_checkpoint,
    source_digest,
)
from loraprune_ds.checkpoint.save import drop_old, save_shape, save_step
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import differences
from loraprune_ds.errors import UserError, require
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.output import MAY_DIFFER, OutputFolder
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.engine import TrainingEngine, build_training_engine
from loraprune_ds.zero.lora_state import adam_step, restore_lora_state
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import LocalWrites


def find_checkpoint(output: OutputFolder, comm: Communicator, warnings: list[str]) -> TrainingCheckpoint | None:
    """Finds the checkpoint to resume from. None: the run starts at step 0. Collective.

    `warnings` gets a line for each unusable checkpoint. Raises UserError if a given path has no usable one of this run.
    """
    config, path = output.config, output.resume_path
    # A step's folder, even if it lost its state. A run may have any name, even step-1.
    if path is not None and ((path / STATE_FILE).is_file() or path.parent.name == CHECKPOINTS_FOLDER):
        checkpoint = open_training_checkpoint(path, comm)
    else:
        root = path or output.path
        root = root if root.resolve().name == CHECKPOINTS_FOLDER else root / CHECKPOINTS_FOLDER
        # This comes before full reads, and before another run's checkpoints are called damaged.
        comm.all_or_raise(lambda: _check_settings(newest_state(root), root, config))
        checkpoint = find_newest(root, comm, warnings.append)
        if checkpoint is None and path is not None:
            because = f" ({warnings[-1]})" if warnings else ""
            raise UserError(f"--resume {path}: no usable checkpoint there{because}")
    if checkpoint is None:
        warnings.append("no usable checkpoint: starting at step 0")
        return None
    _check_settings(checkpoint.state, checkpoint.folder, config)
    return checkpoint


def _check_settings(state: RunState | None, folder: Path, config: RunConfig) -> None:
    if state is not None:
        different = ", ".join(differences(recorded_config(state.config, folder), config, MAY_DIFFER))
        require(not different, f"{folder} belongs to a run with other settings: {different}")


def check_data(checkpoint: TrainingCheckpoint, prepared: Prepared) -> None:
    """Raises UserError if a run would go on with other samples, or another held-out text, than it began with."""
    before, now, data = checkpoint.state.data, prepared.data, prepared.config.data
    held_out = "data.path" if data.held_out is None else "data.held_out"
    parts = (("data.path", "samples"), (held_out, "held_out"), ("train.epochs", "steps"))
    other = dict.fromkeys(key for key, part in parts if getattr(before, part) != getattr(now, part))
    require(not other, f"{checkpoint.folder} belongs to a run with other data: {', '.join(other)}")


def build_engine(prepared: Prepared, checkpoint: TrainingCheckpoint | None) -> TrainingEngine:
    """Builds the sharded training model, fresh or from a checkpoint. Collective."""
    config, frozen = prepared.config, prepared.pretrained
    if checkpoint is not None:
        config = replace(config, model=replace(config.model, adapter=None))  # the checkpoint has its LoRA
        frozen = checkpoint.frozen_model(frozen)
    engine = build_training_engine(frozen, prepared.ds_config, prepared.pruning.schedule.cycles(), config)
    if checkpoint is None:
        return engine
    state = checkpoint.state
    restore_lora_state(engine.model, checkpoint.read_flat, state.adam_step)
    engine.restore_counters(state.step, state.schedule, state.loss_scale)
    return engine


class Checkpoints:
    """Writes the checkpoints of one run."""

    def __init__(self, context: RunContext, pruner: Pruner) -> None:
        self.config, self.prepared, self.pruner = context.config, context.prepared, pruner
        self.root, checkpoint = context.folder / CHECKPOINTS_FOLDER, context.checkpoint
        self._resumed_from = context.resumed_from
        self._cuts = self.prepared.pruning.schedule.cut_steps
        # The newest shape folder of this run's steps. A resume from an older step leaves newer folders in `root`.
        self._published: ShapeSource | None = None
        if checkpoint and checkpoint.folder.parent.resolve() == self.root.resolve():
            self._published = None if checkpoint.state.shape.is_source else checkpoint.state.shape

    def save(self, engine: TrainingEngine, step: int, totals: RunTotals) -> None:
        """Publishes `step-{step}` and, if a refit changed them, the frozen weights. Collective."""
        pruner, compensator = self.pruner.state(), self.pruner.compensator
        schedule, loss_scale = engine.counters()
        cuts = sum(cut <= step for cut in self._cuts)
        state = RunState(
            step=step,
            totals=totals,
            adam_step=adam_step(engine.model),
            schedule=schedule,
            loss_scale=loss_scale,
            kept=keep_to_lists(pruner.kept_of_dense, engine.model.shape.kinds),
            updates_since_cut=pruner.updates_since_cut,
            moment_tokens=pruner.moment_tokens,
            cuts=cuts,
            shape=self._shape(engine.model, cuts),
            resumed_from=self._resumed_from,
            data=self.prepared.data,
            asked=self.prepared.pruning.schedule.section(step).ratio,
            config=self.config.to_dict(),
        )
        save_step(engine.model, self.root, state, pruner, compensator and compensator.moments)

    def drop_old(self, comm: Communicator, step: int) -> None:
        """Removes files that no later start needs, once `step-{step}` is published. Collective."""
        keep_last = self.config.checkpoint.keep_last
        LocalWrites(comm, self.root).do_on_rank_0(lambda: drop_old(self.root, step, keep_last))

    @cached_property
    def _source(self) -> ShapeSource:
        dense = self.prepared.pretrained
        return ShapeSource(str(dense.folder.resolve()), source_digest(dense), is_source=True)

    def _shape(self, model: ShardedModel, cuts: int) -> ShapeSource:
        """Returns the place of the frozen weights, and writes them if no folder has them yet. Collective."""
        if cuts == 0 or self.config.prune.compensate == "none":  # slices of the dense model
            return self._source
        if self._published is None or self._published.folder != f"shape-{cuts}":
            self._published = save_shape(model, self.root, cuts, self.config.model.dtype)
        return self._published
