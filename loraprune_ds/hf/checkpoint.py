"""Keeps the pruner's state in a trainer's checkpoint, and cuts a fresh model to match it.

checkpoint-120/pruning/    state.json, metrics.jsonl, manifest.json, and like a step of our trainer
                           scores.safetensors, inputs-*.safetensors, refit-*.safetensors

The trainer saves LoRA, its optimizer and its own state. `pruning/` is written last, so it marks a complete checkpoint.
"""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import STATE_FILE
from loraprune_ds.checkpoint.load import keep_from_lists, open_refits, restore_pruner
from loraprune_ds.checkpoint.save import Staging, write_pruner, write_refits
from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, fail_point, require
from loraprune_ds.files import json_text, read_json
from loraprune_ds.hf.live import find_peft_model, live_shape
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.adapters import base_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.pretrained import ModelWeights
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel, full_shape, held, is_sharded
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range, owner_rounds
from loraprune_ds.report.records import METRICS_FILE, History, read_history, write_history

FOLDER = "pruning"
TRAINER_STATE = "trainer_state.json"  # the last file that a Trainer writes


@dataclass(frozen=True)
class PruningState:
    """Describes pruning after `step` optimizer steps. The schedule has `steps`."""

    step: int
    steps: int
    world_size: int
    seed: int
    prune: PruneConfig
    dense: list[list[int]]  # per layer, the number of groups of each kind
    kept: list[list[list[int]]]  # per layer, the kept groups of each kind, as indices into the dense model
    updates_since_cut: int
    moment_tokens: float
    resumed_from: list[int]
    zero: bool = True  # ZeRO-3 has saved the rest of the checkpoint
    format: int = layout.FORMAT


@dataclass(frozen=True)
class PruningCheckpoint:
    """Holds a verified checkpoint that the live model matches after cuts. `dense` is the shape before any cut."""

    folder: Path
    state: PruningState
    dense: ModelShape

    def restore(self, pruner: Pruner) -> History:
        """Restores the pruner of a model that has been cut. Returns the records so far."""
        state, folder = self.state, self.folder / FOLDER
        restore_pruner(pruner, folder, state.kept, state.updates_since_cut, state.moment_tokens)
        return read_history(folder / METRICS_FILE)


def write_pruning(folder: Path, state: PruningState, pruner: Pruner, model: PrunableModel, history: History) -> None:
    """Writes `folder`/pruning. Each rank adds the input moments and refits of its layers. Collective."""
    with Staging(model.comm, folder / FOLDER, "pruning") as staging:
        if model.rank == 0:
            staging.write(STATE_FILE, lambda path: path.write_text(json_text(state)))
            staging.write(METRICS_FILE, lambda path: write_history(path, history))
        for layers in owner_rounds(len(model.layers), model.world_size):
            write_refits(staging, pruner, model, layers)
        write_pruner(staging, pruner)
        fail_point("save.pruning_written")
        staging.publish()


def cut_to_checkpoint(
    model: nn.Module, folder: Path, config: PruneConfig, comm: Communicator
) -> PruningCheckpoint | None:
    """Cuts a dense PEFT model to match a checkpoint, before its training begins. None without a checkpoint. Collective.

    Arguments and errors are those of `LoraPruneCallback.resume`. The weights may already be sharded.
    """
    checkpoint = comm.all_or_raise(lambda: _find(folder))
    if checkpoint is None:
        return None
    state = comm.all_or_raise(lambda: _read(checkpoint, config, comm))
    peft_model = find_peft_model(model)
    dense = live_shape(peft_model)
    require(group_counts(dense) == state.dense, f"{checkpoint} belongs to another model: its layers have other sizes")
    keep = keep_from_lists(state.kept, dense.kinds)
    if any(map(is_sharded, peft_model.parameters())):
        from loraprune_ds.zero.external_engine import cut_shards

        cut_shards(peft_model, dense, keep, comm)
    LocalModel(peft_model, dense).cut(keep)
    _overwrite(peft_model, open_refits(dense.after(keep), checkpoint / FOLDER), comm)
    return PruningCheckpoint(checkpoint, state, dense)


def group_counts(shape: ModelShape) -> list[list[int]]:
    """Returns per layer the number of groups of each kind."""
    return [[layer[kind] for kind in shape.kinds] for layer in shape.counts]


@torch.no_grad()
def _overwrite(model: PeftModel, weights: ModelWeights, comm: Communicator) -> None:
    """Reads those linears again that `weights` has. A shard was replaced by the cut, so it has no second copy (hpZ)."""
    layers = decoder_layers(model)
    for i, linear in weights.shape.linears():
        name = f"{weights.shape.prefix(i)}{linear.name}"
        if name in weights.files:
            parameter = base_parameter(layers[i], linear.name)
            numel = math.prod(full_shape(parameter))
            start, end = owned_range(numel, comm.world_size, comm.rank) if is_sharded(parameter) else (0, numel)
            held(parameter).view(-1)[: end - start].copy_(weights.read_flat(name, start, end, parameter.dtype))


def _find(folder: Path) -> Path | None:
    checkpoints = [folder / f"checkpoint-{step}" for step in layout.numbered(folder, "checkpoint")]
    for checkpoint in (folder, *reversed(checkpoints)):
        if (checkpoint / FOLDER).is_dir():
            return checkpoint
    is_checkpoint = folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name)
    if checkpoints or is_checkpoint or (folder / TRAINER_STATE).is_file():
        newest = checkpoints[-1] if checkpoints else folder
        raise UserError(f"{newest} has no {FOLDER}/: its save was interrupted, or LoraPruneCallback was absent")
    return None


def _read(folder: Path, config: PruneConfig, comm: Communicator) -> PruningState:
    path = folder / FOLDER / STATE_FILE
    raw = read_json(path)
    layout.check_format(raw.get("format", 4), path)
    try:
        raw["prune"] = layout.recorded_config({"output_dir": str(folder), "prune": raw["prune"]}, path).prune
        state = PruningState(**raw)
    except (KeyError, TypeError):
        raise UserError(f"{path} is damaged: a field is missing or unknown") from None
    ranks, defaults, saved = state.world_size, asdict(PruneConfig()), asdict(state.prune)
    needed = f"{folder} was saved by {ranks} ranks, so DeepSpeed needs {ranks} ranks to load it"
    require(ranks == comm.world_size or not state.zero, needed)
    different = [  # settings with their default value come from the checkpoint
        key for key, value in asdict(config).items() if value not in (defaults[key], saved[key])
    ]
    require(not different, f"{folder} was saved with other settings: {', '.join(different)}")
    layout.verify(folder / FOLDER, part=comm.rank, parts=comm.world_size)
    return state
