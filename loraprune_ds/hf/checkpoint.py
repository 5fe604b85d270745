"""Keeps the pruner's state in a trainer's checkpoint, and cuts a fresh model to it.

checkpoint-120/pruning/    state.json, scores.safetensors, moments-*.safetensors, metrics.jsonl, manifest.json
checkpoint-120/shape-3/    the frozen weights, if `compensate` has changed them

The trainer itself saves LoRA, its optimizer and its own state. `pruning/` is written last, so a checkpoint that has it
is complete.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import METRICS_FILE, STATE_FILE
from loraprune_ds.checkpoint.load import keep_from_lists, keep_to_lists, read_moments, read_scores
from loraprune_ds.checkpoint.save import Staging, save_shape, write_moments, write_scores
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_file import forget_removed
from loraprune_ds.errors import UserError, fail_point, require
from loraprune_ds.files import read_json, remove_leftovers
from loraprune_ds.hf.live import PrunedTraining, find_peft_model, live_shape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.storage import MODEL_DTYPE
from loraprune_ds.model.weights import open_stored
from loraprune_ds.pruning.step import PrunerState
from loraprune_ds.report.metrics import read_metrics, write_history
from loraprune_ds.report.records import history_from
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.external_engine import cut_without_engine, overwrite_linears

FOLDER = "pruning"
TRAINER_STATE = "trainer_state.json"  # the last file that a Trainer writes itself


@dataclass(frozen=True)
class PruningState:
    """Describes pruning after `step` optimizer steps. The schedule is made for `steps`."""

    step: int
    steps: int
    world_size: int
    seed: int
    prune: dict[str, Any]  # the PruneConfig
    dense: list[list[int]]  # per layer, the number of groups of each kind
    kept: list[list[list[int]]]  # per layer, the kept groups of each kind, as indices into the dense model
    updates_since_cut: int
    moment_tokens: float
    shape: str | None  # folder of the frozen weights. None where they are slices of the dense model
    resumed_from: list[int]
    format: int = layout.FORMAT


@dataclass(frozen=True)
class PruningCheckpoint:
    """Holds a verified checkpoint that the live model has been cut to. `dense` is its shape before any cut."""

    folder: Path
    state: PruningState
    dense: ModelShape

    @property
    def config(self) -> PruneConfig:
        return PruneConfig(**self.state.prune)

    def check(self, steps: int, seed: int) -> None:
        """Raises UserError if a training has other steps or another seed, and so would make other cuts."""
        state = self.state
        require(state.steps == steps, f"the checkpoint's schedule is of {state.steps} steps, not of {steps}")
        require(state.seed == seed, f"the checkpoint's seed is {state.seed}, not {seed}")

    def restore(self, training: PrunedTraining) -> None:
        """Continues a training whose model has been cut to this checkpoint."""
        state, folder = self.state, self.folder / FOLDER
        kept, scores = keep_from_lists(state.kept, self.dense.kinds), read_scores(folder, self.dense.kinds)
        pruner = PrunerState(kept, scores, state.updates_since_cut, state.moment_tokens)
        training.pruner.restore(pruner, lambda layer: read_moments(folder, layer))
        training.step = state.step
        training.recorder.history = history_from(read_metrics(folder / METRICS_FILE))
        training.resumed_from = [*state.resumed_from, state.step]


def save_pruning(training: PrunedTraining, folder: Path) -> None:
    """Writes `folder`/pruning, and the frozen weights if they are not slices of the dense model. Collective."""
    model, pruner, history = training.model, training.pruner, training.recorder.history
    if model.rank == 0:
        remove_leftovers(folder)
    shape, cuts, kinds = None, len(history.cuts), model.shape.kinds
    if cuts and pruner.config.compensate != "none":
        shape = save_shape(model, folder, cuts, training.dtype).folder
    of_pruner = pruner.state()
    state = PruningState(
        step=training.step,
        steps=training.steps,
        world_size=model.world_size,
        seed=training.seed,
        prune=asdict(pruner.config),
        dense=[[layer[kind] for kind in kinds] for layer in pruner.limits.dense.layers],
        kept=keep_to_lists(of_pruner.kept_of_dense, kinds),
        updates_since_cut=of_pruner.updates_since_cut,
        moment_tokens=of_pruner.moment_tokens,
        shape=shape,
        resumed_from=training.resumed_from,
    )
    with Staging(model.comm, folder / FOLDER, "pruning") as staging:
        if model.rank == 0:
            staging.write(STATE_FILE, lambda path: path.write_text(json.dumps(asdict(state)) + "\n"))
            staging.write(METRICS_FILE, lambda path: write_history(path, history))
            write_scores(staging, of_pruner.scores)
        for layer in range(len(model.layers)):
            if pruner.compensator is not None and model.owner(layer) == model.rank:
                write_moments(staging, layer, pruner.compensator.moments.of_layer(layer))
        fail_point("save.pruning_written")
        staging.publish()


def cut_to_checkpoint(
    model: nn.Module, folder: Path, config: PruneConfig, comm: Communicator
) -> PruningCheckpoint | None:
    """Cuts a dense PEFT model to a checkpoint, before DeepSpeed takes it. None without a checkpoint. Collective.

    Args:
        model: dense, with LoRA. Its weights may be sharded already.
        folder: a checkpoint, or the folder with a trainer's checkpoints, of which the newest complete one counts.

    Raises:
        UserError: the checkpoint is damaged, or it is of another model, config or number of ranks.
    """
    found = comm.all_or_raise(lambda: _find(folder))
    if found is None:
        return None
    state = comm.all_or_raise(lambda: _read(found, config, comm))
    peft_model = find_peft_model(model)
    dense = live_shape(peft_model)
    if [[layer[kind] for kind in dense.kinds] for layer in dense.layers] != state.dense:
        raise UserError(f"{found} was made of another model: its layers have other sizes")
    keep = keep_from_lists(state.kept, dense.kinds)
    cut_without_engine(peft_model, dense, keep)
    if state.shape is not None:
        shape_folder, shape = found / state.shape, dense.after(keep)
        weights = comm.all_or_raise(lambda: open_stored(shape_folder, shape, MODEL_DTYPE))
        overwrite_linears(peft_model, shape, weights.read_flat)
    return PruningCheckpoint(found, state, dense)


def _find(folder: Path) -> Path | None:
    checkpoints = [folder / f"checkpoint-{step}" for step in layout.numbered(folder, "checkpoint")]
    for checkpoint in (folder, *reversed(checkpoints)):
        if (checkpoint / FOLDER).is_dir():
            return checkpoint
    is_checkpoint = folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name)
    if checkpoints or is_checkpoint or (folder / TRAINER_STATE).is_file():
        newest = checkpoints[-1] if checkpoints else folder
        raise UserError(f"{newest} has no {FOLDER}/: its save was cut short, or it was saved without LoraPruneCallback")
    return None


def _read(folder: Path, config: PruneConfig, comm: Communicator) -> PruningState:
    path = folder / FOLDER / STATE_FILE
    raw = read_json(path)
    layout.check_format(raw.get("format"), path)
    try:
        state = PruningState(**raw)
        state = replace(state, **forget_removed({"prune": state.prune}))
    except TypeError:
        raise UserError(f"{path} is damaged: a field is missing or unknown") from None
    if state.world_size != comm.world_size:
        raise UserError(
            f"{folder} was saved by {state.world_size} ranks, so DeepSpeed loads it on {state.world_size} only"
        )
    defaults = asdict(PruneConfig())  # a setting that has its default is not given: it comes from the checkpoint
    given = {key: value for key, value in asdict(config).items() if value != defaults[key]}
    if different := [key for key, value in given.items() if state.prune.get(key) != value]:
        raise UserError(f"{folder} was saved with other settings: {', '.join(different)}")
    for part in (FOLDER, state.shape):
        if part is not None:
            layout.verify(folder / part, part=comm.rank, parts=comm.world_size)
    return state
