"""Keeps the pruner's state beside a trainer's checkpoint, and cuts a fresh model to it.

checkpoint-120/pruning/    state.json, scores.safetensors, moments-*.safetensors, metrics.jsonl, manifest.json
checkpoint-120/shape-3/    the frozen weights, if `compensate` has changed them

The trainer itself saves LoRA, its optimizer and its own state. The folder is written last. So a checkpoint that has it
is whole.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.pruner_files import (
    keep_from_lists,
    keep_to_lists,
    read_moments,
    read_scores,
    write_moments,
    write_scores,
)
from loraprune_ds.checkpoint.run_folder import METRICS_FILE
from loraprune_ds.checkpoint.save import save_shape
from loraprune_ds.checkpoint.staging import Staging
from loraprune_ds.checkpoint.state import STATE_FILE
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_file import forget_removed
from loraprune_ds.errors import UserError, require
from loraprune_ds.faults import fail_point
from loraprune_ds.files import read_json
from loraprune_ds.hf.live import base_config, find_peft_model, live_shape
from loraprune_ds.hf.training import PrunedTraining
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.step import PrunerState
from loraprune_ds.report.metrics import read_metrics, write_history
from loraprune_ds.report.records import history_from
from loraprune_ds.whole import remove_leftovers
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.cut import cut_without_engine, overwrite_linears

FOLDER = "pruning"
TRAINER_STATE = "trainer_state.json"  # what a Trainer writes last of its own


@dataclass(frozen=True)
class PruningState:
    """Describes pruning after `step` optimizer steps.

    Attributes:
        steps: of the whole training, which the schedule is made for.
        world_size: the ranks that DeepSpeed's part of the checkpoint belongs to.
        prune: the `PruneConfig`.
        dense: per layer, the groups of the dense model, of each of the family's kinds.
        kept: per layer, the kept ones of each kind, as indices into the dense model.
        shape: name of the folder with the frozen weights. None where they are slices of the dense model.
    """

    step: int
    steps: int
    world_size: int
    seed: int
    prune: dict[str, Any]
    dense: list[list[int]]
    kept: list[list[list[int]]]
    updates_since_cut: int
    moment_tokens: float
    shape: str | None
    resumed_from: list[int]
    format: int = layout.FORMAT


@dataclass(frozen=True)
class PruningCheckpoint:
    """Holds a verified checkpoint that the live model has been cut to.

    Attributes:
        folder: the trainer's checkpoint.
        dense: shape of the model before any cut.
    """

    folder: Path
    state: PruningState
    dense: ModelShape

    @property
    def config(self) -> PruneConfig:
        """The settings of the training that saved this."""
        return PruneConfig(**self.state.prune)

    def check(self, steps: int, seed: int) -> None:
        """Checks that a training would cut where and what the one would have that saved this.

        Raises:
            UserError: its steps or its seed are others.
        """
        state = self.state
        require(state.steps == steps, f"the checkpoint's schedule is of {state.steps} steps, not of {steps}")
        require(state.seed == seed, f"the checkpoint's seed is {state.seed}, not {seed}")

    def restore(self, training: PrunedTraining) -> None:
        """Lets a training whose model has been cut to this checkpoint go on from it."""
        state, folder = self.state, self.folder / FOLDER
        kept, scores = keep_from_lists(state.kept, self.dense.kinds), read_scores(folder, self.dense.kinds)
        pruner = PrunerState(kept, scores, state.updates_since_cut, state.moment_tokens)
        training.pruner.restore(pruner, lambda layer: read_moments(folder, layer))
        training.step = state.step
        training.history = history_from(read_metrics(folder / METRICS_FILE))
        training.resumed_from = [*state.resumed_from, state.step]


def save_pruning(training: PrunedTraining, folder: Path) -> None:
    """Writes `folder`/pruning, and the frozen weights if they are not slices of the dense model. Collective.

    Raises:
        RunError: a rank cannot write.
    """
    model, pruner = training.model, training.pruner
    if model.rank == 0:
        remove_leftovers(folder)
    shape, cuts = None, len(training.history.cuts)
    if cuts and training.pruner.config.compensate != "none":
        described = export_config(base_config(training.peft_model), model.shape, training.dtype).config
        shape = save_shape(model, folder, cuts, described, training.dtype).folder
    state, moments = pruner.state(), None if pruner.compensator is None else pruner.compensator.moments
    with Staging(model.comm, folder / FOLDER, "pruning") as staging:
        if model.rank == 0:
            text = json.dumps(asdict(_describe(training, state, shape)))
            staging.write(STATE_FILE, lambda path: path.write_text(text + "\n"))
            staging.write(METRICS_FILE, lambda path: write_history(path, training.history))
            write_scores(staging, state.scores)
        for layer in range(len(model.layers)):
            if moments is not None and model.owner(layer) == model.rank:
                write_moments(staging, layer, moments.of_layer(layer))
        fail_point("save.pruning_written")
        staging.publish()


def _describe(training: PrunedTraining, state: PrunerState, shape: str | None) -> PruningState:
    kinds = training.model.shape.kinds
    return PruningState(
        step=training.step,
        steps=training.steps,
        world_size=training.model.world_size,
        seed=training.seed,
        prune=asdict(training.pruner.config),
        dense=[[layer[kind] for kind in kinds] for layer in training.pruner.limits.dense.layers],
        kept=keep_to_lists(state.kept_of_dense, kinds),
        updates_since_cut=state.updates_since_cut,
        moment_tokens=state.moment_tokens,
        shape=shape,
        resumed_from=training.resumed_from,
    )


def cut_to_checkpoint(
    model: nn.Module, folder: Path, config: PruneConfig, comm: Communicator
) -> PruningCheckpoint | None:
    """Gives a dense PEFT model the sizes of a checkpoint, before DeepSpeed takes it. Collective.

    Args:
        model: dense, with LoRA. Its weights may be sharded already.
        folder: a checkpoint, or the folder with a trainer's checkpoints, of which the newest whole one counts.

    Returns:
        None if the folder has no checkpoint.

    Raises:
        UserError: the checkpoint is damaged, or it is of another model, config or number of ranks.
    """
    whole = comm.all_or_raise(lambda: _find(folder))
    if whole is None:
        return None
    found: Path = whole
    state = comm.all_or_raise(lambda: _read(found, config, comm))
    peft_model = find_peft_model(model)
    dense = live_shape(peft_model)
    if [[layer[kind] for kind in dense.kinds] for layer in dense.layers] != state.dense:
        raise UserError(f"{found} was made of another model: its layers have other sizes")
    cut_without_engine(peft_model, dense, keep_from_lists(state.kept, dense.kinds))
    if state.shape is not None:
        pretrained = comm.all_or_raise(lambda: open_pretrained(found / str(state.shape)))
        overwrite_linears(peft_model, live_shape(peft_model), pretrained.read_flat)
    return PruningCheckpoint(found, state, dense)


def _find(folder: Path) -> Path | None:
    if (folder / FOLDER).is_dir():
        return folder
    steps = layout.numbered(folder, "checkpoint")
    whole = [step for step in steps if (folder / f"checkpoint-{step}" / FOLDER).is_dir()]
    if whole:
        return folder / f"checkpoint-{whole[-1]}"
    if steps:
        raise UserError(f"no checkpoint in {folder} can be resumed: {_lack(folder / f'checkpoint-{steps[-1]}')}")
    is_checkpoint = folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name)
    if is_checkpoint or (folder / TRAINER_STATE).is_file():
        raise UserError(_lack(folder))
    return None


def _lack(folder: Path) -> str:
    """Says why a checkpoint has no `pruning/`."""
    cut_short = any(folder.glob(f".{FOLDER}.*partial")) or not (folder / TRAINER_STATE).is_file()
    or_without = "" if cut_short else ", or it was saved without LoraPruneCallback"
    return f"{folder} has no {FOLDER}/: its save was cut short{or_without}"


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
        raise UserError(f"{folder} was saved by {state.world_size} ranks and DeepSpeed loads it on as many only")
    defaults = asdict(PruneConfig())  # what has its default is not given: it comes from the checkpoint
    given = {key: value for key, value in asdict(config).items() if value != defaults[key]}
    if different := [key for key, value in given.items() if state.prune.get(key) != value]:
        raise UserError(f"{folder} was saved with other settings: {', '.join(different)}")
    for part in (FOLDER, state.shape):
        if part is not None:
            layout.verify(folder / part, part=comm.rank, parts=comm.world_size)
    return state
