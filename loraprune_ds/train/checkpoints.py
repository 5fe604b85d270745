"""Saves and resumes a run, with the state that its parts share. Connects the checkpoint format with the trainer."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.load import TrainingCheckpoint, open_checkpoint
from loraprune_ds.checkpoint.save import drop_old
from loraprune_ds.checkpoint.state import RunData, State, newest_state
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import differences
from loraprune_ds.engine.training import TrainingEngine
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import STATE_FILE, flush
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report.records import METRICS_FILE
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.train.optimizer import build_lora
from loraprune_ds.train.output import MAY_DIFFER, OutputFolder, RunStatus
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.recorder import RunRecorder
from loraprune_ds.train.stop import STOP, RequestListener


@dataclass(frozen=True)
class RunContext:
    """Holds the state that the parts of a run share on one rank."""

    prepared: Prepared
    checkpoint: TrainingCheckpoint | None  # that the run resumes from
    comm: Communicator
    requests: RequestListener
    recorder: RunRecorder
    status: RunStatus

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    def stop_requested(self) -> bool:
        """Checks for requests to stop outside of steps, and honours one. Returns True if there was one. Collective."""
        if max(self.comm.gather_objects(self.requests.current())) != STOP:
            return False
        self.check_owner()  # the file may address the other process
        return self.honour(STOP)

    def honour(self, request: int) -> bool:
        """Removes the files of a request that was carried out. Returns True, and shows a line, if it was to stop."""
        self.requests.clear(request)
        if request == STOP:
            self.recorder.show(f"stopped at step {self.status.step}; go on with --resume auto")
        return request == STOP

    def check_owner(self) -> None:
        """Raises RunError on all ranks if another process continues this run. Collective."""
        self.comm.on_rank_0(self.status.check_owner)


def find_checkpoint(
    output: OutputFolder, comm: Communicator, dense: PretrainedModel, warnings: list[str]
) -> TrainingCheckpoint | None:
    """Finds the checkpoint to resume from. None: the run starts at step 0. Collective.

    `warnings` gets a line for each unusable checkpoint. Raises UserError if a given path has no usable one of this run.
    """
    path = output.resume_path
    open_step = partial(open_checkpoint, ranks=comm, dense=dense, resume=True)
    if path is not None and _is_step(path):
        checkpoint = open_step(path)
    else:
        root = path or output.path
        if root.resolve().name != layout.CHECKPOINTS_FOLDER:
            root /= layout.CHECKPOINTS_FOLDER
        # This comes before full reads, and before another run's checkpoints are called damaged.
        comm.all_or_raise(lambda: _check_settings(newest_state(root), root, output.config))
        steps = comm.from_rank_0(layout.numbered(root, "step"))
        checkpoint = layout.newest_usable(root, steps, open_step, warnings.append)
    if checkpoint is not None:
        _check_settings(checkpoint.state, checkpoint.folder, output.config)
        return checkpoint
    if path is not None:
        because = f" ({warnings[-1]})" if warnings else ""
        raise UserError(f"--resume {path}: no usable checkpoint there{because}")
    warnings.append("no usable checkpoint: starting at step 0")
    return None


def _is_step(path: Path) -> bool:
    """Returns True for a step's folder, even if it lost its state. A run may have any name, even step-1."""
    return (path / STATE_FILE).is_file() or path.parent.name == layout.CHECKPOINTS_FOLDER


def _check_settings(state: State | None, folder: Path, config: RunConfig) -> None:
    if state is not None:
        recorded = layout.recorded_config(state.origin.config, folder)
        different = ", ".join(differences(recorded, config, MAY_DIFFER))
        require(not different, f"{folder} belongs to a run with other settings: {different}")


def check_data(checkpoint: TrainingCheckpoint, prepared: Prepared) -> None:
    """Raises UserError if a run would go on with other samples, or another held-out text, than it began with."""
    origin = checkpoint.state.origin
    before = origin.data
    now = cast(RunData, prepared.origin.data)
    if before is None:
        raise UserError(f"{checkpoint.folder} is of a callback, which resumes it; a run cannot")
    keys: list[str] = []
    if before.samples != now.samples:
        keys.append("data.path")
    if before.held_out != now.held_out:
        keys.append("data.path" if prepared.config.data.held_out is None else "data.held_out")
    if origin.steps != prepared.origin.steps:
        keys.append("train.epochs")
    different = ", ".join(dict.fromkeys(keys))
    require(not different, f"{checkpoint.folder} belongs to a run with other data: {different}")


def build_engine(prepared: Prepared, checkpoint: TrainingCheckpoint | None) -> TrainingEngine:
    """Builds the training engine, fresh or with the weights and counters of a checkpoint. Collective."""
    config = prepared.config
    frozen = prepared.pretrained
    if checkpoint is not None:
        # the checkpoint has its LoRA
        config = replace(config, model=replace(config.model, adapter=None))
        frozen = checkpoint.frozen_model
    engine = prepared.engine.build_training_engine(
        frozen,
        config.model.attn_implementation,
        config.model.dtype,
        prepared.ds_config,
        partial(build_lora, frozen.shape, config, prepared.schedule.cycles()),
        config.train.max_grad_norm,
    )
    if checkpoint is not None:
        counters = checkpoint.resume_state()
        engine.restore_counters(checkpoint.state.step, counters.schedule)
    return engine


def save_checkpoint(context: RunContext, engine: TrainingEngine, pruning: Pruning) -> None:
    """Publishes `step-{step}`, then removes files that no later start needs. Collective."""
    root = context.folder / layout.CHECKPOINTS_FOLDER
    step = pruning.step
    comm = context.comm
    context.check_owner()
    # A checkpoint must not outlive the records of the steps before it.
    comm.write_on_rank_0(context.folder, lambda: flush(context.folder / METRICS_FILE))
    pruning.save_step(
        layout.step_folder(root, step), "step", schedule=engine.lr_scheduler.state_dict()
    )
    context.check_owner()
    keep_last = context.config.checkpoint.keep_last
    comm.write_on_rank_0(root, lambda: drop_old(root, step, keep_last))
