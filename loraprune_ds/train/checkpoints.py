"""Saves and resumes a run: ties the checkpoint format to the trainer."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.checkpoint.load import Saved, find_newest, newest_state, open_saved, source_of
from loraprune_ds.checkpoint.run_folder import CHECKPOINTS_FOLDER
from loraprune_ds.checkpoint.save import drop_old, save_shape, save_step
from loraprune_ds.checkpoint.state import STATE_FILE, RunState, ShapeSource, Tally
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.output import MAY_DIFFER, Start, differences
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.engine import build_training_store
from loraprune_ds.zero.sharded import ShardedStore
from loraprune_ds.zero.store import LayerKeep
from loraprune_ds.zero.training_state import adam_step, counters, restore_counters, restore_lora_state
from loraprune_ds.zero.write import LocalWrites


def find_saved(start: Start, config: RunConfig, comm: Communicator, warnings: list[str]) -> Saved | None:
    """The checkpoint to go on from; None to start at step 0. Collective.

    Raises:
        UserError: a checkpoint was asked for by path and is not there or not good, or it belongs to another run.
    """
    if start.kind != "resume":
        return None
    if start.path is not None and _is_step(start.path):
        saved = open_saved(start.path, comm)
    else:
        root = _root(Path(config.output_dir) if start.path is None else start.path)
        # Before anything is read in full, and before another run's checkpoints are called damaged.
        comm.together(lambda: _check_settings(newest_state(root), root, config))
        saved = find_newest(root, comm, warnings.append)
        if saved is None and start.path is not None:
            raise UserError(f"--resume {start.path}: no usable checkpoint there{_because(warnings)}")
    if saved is None:
        warnings.append("no usable checkpoint: starting at step 0")
        return None
    _check_settings(saved.state, saved.folder, config)
    return saved


def _is_step(path: Path) -> bool:
    """Also where its state is lost; a run may have any name, step-1 too."""
    return (path / STATE_FILE).is_file() or path.resolve().parent.name == CHECKPOINTS_FOLDER


def _root(path: Path) -> Path:
    """Where the checkpoints of a run are, given its folder or that very one."""
    return path if path.resolve().name == CHECKPOINTS_FOLDER else path / CHECKPOINTS_FOLDER


def _check_settings(state: RunState | None, folder: Path, config: RunConfig) -> None:
    if state is not None and (different := differences(state.config, config.to_dict(), MAY_DIFFER)):
        raise UserError(f"{folder} belongs to a run with other settings: {', '.join(different)}")


def _because(warnings: list[str]) -> str:
    return f" ({warnings[-1]})" if warnings else ""


def build_store(config: RunConfig, prepared: Prepared, saved: Saved | None) -> ShardedStore:
    """The sharded training model, fresh or as a checkpoint has it: its shape first, then the state to its owners."""
    if saved is None:
        return build_training_store(config, prepared.checkpoint, prepared.ds_config, prepared.steps)
    state = saved.state
    without_adapter = replace(config, model=replace(config.model, adapter=None))  # its LoRA comes from the checkpoint
    frozen = saved.frozen_weights(config)
    store = build_training_store(without_adapter, frozen, prepared.ds_config, prepared.steps)
    # The family is the dense model's, even where the smaller one had to be described as another.
    store.shape = prepared.checkpoint.shape.with_layers(frozen.shape.layers)
    restore_lora_state(store, saved.read_flat, state.adam_step)
    restore_counters(store, state.step, state.schedule, state.loss_scale)
    return store


def restore_pruner(pruner: Pruner, saved: Saved) -> None:
    """Kept groups and moving averages, and the moments of inputs where a cut is made up for."""
    kept = [LayerKeep(torch.tensor(heads), torch.tensor(channels)) for heads, channels in saved.state.kept]
    pruner.restore(kept, saved.scores(), saved.state.updates_since_cut)
    if pruner.compensator is not None:
        pruner.compensator.moments.restore(saved.moments)


class Checkpoints:
    """Writes the checkpoints of one run."""

    def __init__(self, config: RunConfig, prepared: Prepared, pruner: Pruner, saved: Saved | None) -> None:
        self.config = config
        self.prepared = prepared
        self.pruner = pruner
        self.resumed_from = [*saved.state.resumed_from, saved.state.step] if saved else []
        self.root = Path(config.output_dir) / CHECKPOINTS_FOLDER
        self._cuts = prepared.schedule.cut_steps()
        # The newest shape folder that is of this run's course; others under `root` may be of one that it has left.
        self._published: ShapeSource | None = None
        if saved and saved.folder.parent.resolve() == self.root.resolve() and not saved.state.shape.is_source:
            self._published = saved.state.shape

    def save(self, store: ShardedStore, step: int, tally: Tally) -> None:
        """Publishes `step-{step}` and, if a refit changed them, the frozen weights; then drops old ones. Collective.

        Raises:
            RunError: a rank cannot write; what was published before is still there.
        """
        schedule, loss_scale = counters(store)
        state = RunState(
            step=step,
            tally=tally,
            adam_step=adam_step(store),
            schedule=schedule,
            loss_scale=loss_scale,
            kept=[(keep.heads.tolist(), keep.channels.tolist()) for keep in self.pruner.kept],
            updates_since_cut=self.pruner.average.updates_since_cut,
            cuts=self._cuts_made(step),
            shape=self._shape(store, step),
            resumed_from=self.resumed_from,
            config=self.config.to_dict(),
        )
        compensator = self.pruner.compensator
        moments = None if compensator is None else compensator.moments
        save_step(store, self.root, state, self.pruner.average.scores, moments)
        writes = LocalWrites()
        if store.rank == 0:
            writes.do(lambda: drop_old(self.root, step, self.config.checkpoint.keep_last))
        writes.agree(store.comm, self.root)

    @cached_property
    def _source(self) -> ShapeSource:
        """Read once: the uncut weights do not change while a run lasts."""
        return source_of(self.prepared.checkpoint)

    def _cuts_made(self, step: int) -> int:
        return sum(cut <= step for cut in self._cuts)

    def _shape(self, store: ShardedStore, step: int) -> ShapeSource:
        cuts = self._cuts_made(step)
        only_sliced = cuts == 0 or self.config.prune.compensate == "none"
        if only_sliced and not self.config.checkpoint.copy_source:
            return self._source
        if self._published is not None and self._published.folder == f"shape-{cuts}":
            return self._published
        dtype = self.config.model.dtype
        described: dict[str, Any] = export_config(self.prepared.checkpoint.config, store.shape, dtype).config
        self._published = save_shape(store, self.root, cuts, described, dtype)
        return self._published
