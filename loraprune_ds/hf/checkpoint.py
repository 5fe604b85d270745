"""Keeps the pruner's state in a trainer's checkpoint, and cuts a fresh model to match it.

checkpoint-120/pruning/    state.json, metrics.jsonl, manifest.json, and like a step of our trainer
                           scores.safetensors, inputs-*.safetensors, refit-*.safetensors, lora-*.safetensors
                           and adam-*.safetensors, from which another engine, or other ranks, go on

The trainer saves LoRA, its optimizer and its own state. `pruning/` is written last, so it marks a complete checkpoint.
"""

import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from pydantic import SkipValidation
from torch import nn
from torch.optim import Adam, AdamW
from transformers.trainer import SCHEDULER_NAME

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.load import keep_from_lists, open_refits, read_flat, restore_pruner
from loraprune_ds.checkpoint.save import Staging, write_tensors
from loraprune_ds.config import PruneConfig
from loraprune_ds.engine.live import LiveEngine
from loraprune_ds.engine.optimizer_state import OptimizerState
from loraprune_ds.engines import full_shape, future_engine, holder
from loraprune_ds.errors import UserError, fail_point, require
from loraprune_ds.files import json_text
from loraprune_ds.hf.live import find_peft_model, live_shape
from loraprune_ds.hf.quantised import adopt_quantised
from loraprune_ds.hf.trainer_files import TRAINER_STATE, TrainerFiles
from loraprune_ds.model.adapters import ADAPTER, base_linear, base_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.frozen import storage_format
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import name_in_file
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, read_header
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report.records import METRICS_FILE, History, read_history, write_history

FOLDER = "pruning"
COMPLETE = "resume from a complete checkpoint, on the engine and the ranks that saved it"
# begin the names of files that need the same engine
OF_ENGINE = ("global_step", "latest", "optimizer", "scheduler")


@dataclass(frozen=True)
class PruningState:
    """Describes pruning after `step` optimizer steps. The schedule has `steps`."""

    step: int
    steps: int
    world_size: int
    seed: int
    prune: SkipValidation[PruneConfig]  # `recorded_config` tells of settings of another version
    dense: list[list[int]]  # per layer, the number of groups of each kind
    # per layer, the kept groups of each kind, as indices into the dense model
    kept: list[list[list[int]]]
    updates_since_cut: int
    moment_tokens: float
    resumed_from: list[int]
    zero: bool = True  # ZeRO-3 has saved the rest of the checkpoint
    # some leave without their key-value head. In older checkpoints none does
    query_heads: bool = False
    adam: Any = None  # Adam's step and param_groups, if the folder has its state
    format: int = layout.FORMAT
    __pydantic_config__ = layout.NO_MORE


@dataclass(frozen=True)
class PruningCheckpoint:
    """Holds a verified checkpoint that the live model matches after cuts.

    Attributes:
        dense: the shape before any cut.
        engine: which will train the model.
        restores_optimizer: the trainer cannot load LoRA and its optimizer, so they come from `pruning/`. Either another
            engine, or another number of ZeRO-3's ranks, has saved the checkpoint, or files are missing.
    """

    folder: Path
    state: PruningState
    dense: ModelShape
    engine: LiveEngine
    restores_optimizer: bool = False

    def restore(self, pruner: Pruner) -> History:
        """Restores the pruner of a model that has been cut. Returns the records so far."""
        state, folder = self.state, self.folder / FOLDER
        restore_pruner(pruner, folder, state.kept, state.updates_since_cut, state.moment_tokens)
        return read_history(folder / METRICS_FILE)

    def restore_lora(self, model: PrunableModel) -> None:
        """Restores LoRA and Adam's state, which the trainer could not load. Collective."""
        adam, folder = plain_adam(model), self.folder / FOLDER
        if adam is None:
            raise UserError(
                f"{self.folder} was saved by Adam; {type(model.optimizer).__name__} cannot go on from it"
            )
        adam.restore(
            model.lora_parameters(),
            partial(read_flat, folder, folder),
            self.state.adam["step"],
            model.comm,
        )

    def write_stand_in(self, folder: Path, comm: Communicator) -> None:
        """Fills a folder, on each rank its own, from which transformers' Trainer goes on with the engine."""
        for path in self.folder.iterdir():
            if not path.name.startswith(OF_ENGINE):
                (folder / path.name).symlink_to(path.resolve())
        # a schedule that changes nothing
        torch.save({"lr_lambdas": [None]}, folder / SCHEDULER_NAME)
        self.engine.write_stand_in(folder, self.state.step, self.state.adam["param_groups"], comm)


def plain_adam(model: PrunableModel) -> OptimizerState | None:
    """Returns the state of torch's Adam or AdamW. None for others, whose checkpoints go on with one engine."""
    optimizer = model.optimizer
    known = isinstance(optimizer, (Adam, AdamW)) and not any(
        group["amsgrad"] for group in optimizer.param_groups
    )
    return model.optimizer_state if known else None


def describe_adam(adam: OptimizerState) -> dict[str, Any]:
    """Returns its step, and its param_groups without parameters, for JSON. DeepSpeed knows no empty group."""
    groups = adam.optimizer.param_groups
    # DeepSpeed has all in buffers of its own
    groups = [group for group in groups if group["params"]] or groups
    return {"step": adam.adam_step, "param_groups": [group | {"params": []} for group in groups]}


def write_pruning(folder: Path, state: PruningState, pruner: Pruner, history: History) -> None:
    """Writes `folder`/pruning. Each rank adds the files of its layers, with LoRA if Adam trains it. Collective."""
    adam = plain_adam(pruner.model)
    state = replace(state, adam=adam and describe_adam(adam))
    with Staging(pruner.model.comm, folder / FOLDER, "pruning") as staging:
        if pruner.model.rank == 0:
            staging.write(layout.STATE_FILE, lambda path: path.write_text(json_text(state)))
            staging.write(METRICS_FILE, lambda path: write_history(path, history))
        write_tensors(staging, pruner, adam)
        fail_point("save.pruning_written")
        staging.publish()


def cut_to_checkpoint(
    model: nn.Module,
    folder: Path,
    config: PruneConfig,
    comm: Communicator,
    files: TrainerFiles | None = None,
) -> PruningCheckpoint | None:
    """Cuts a dense PEFT model to match a checkpoint, before its training begins. None without a checkpoint. Collective.

    Arguments and errors are those of `LoraPruneCallback.resume`. The weights may already be sharded.

    Args:
        files: of transformers' Trainer. None for a loop that loads LoRA and its optimizer itself.
    """
    checkpoint = comm.all_or_raise(lambda: _find(folder))
    if checkpoint is None:
        return None
    peft_model = find_peft_model(model)
    state = comm.all_or_raise(lambda: _read(checkpoint, config, comm))
    engine = future_engine(peft_model)
    zero = engine.name == "zero3"
    obstacle = comm.all_or_raise(lambda: _obstacle(checkpoint, state, files, comm, engine))
    # all ranks must load the same way
    obstacle = next(filter(None, comm.gather_objects(obstacle)), None)
    if obstacle is not None:
        _check_restorable(f"{checkpoint} {obstacle}", state, peft_model, zero=zero)
    if not state.query_heads:
        # `live_shape` reads it
        setattr(cast(Any, peft_model.get_base_model()).config, QUERY_HEADS_LEAVE, False)
    adopt_quantised(peft_model, refits=state.prune.compensate != "none")
    dense = live_shape(peft_model)
    require(
        group_counts(dense) == state.dense,
        f"{checkpoint} belongs to another model: its layers have other sizes",
    )
    comm.all_or_raise(lambda: _check_lora_ranks(checkpoint, peft_model, dense, zero=zero))
    keep = keep_from_lists(state.kept, dense.kinds)
    engine.cut_before_training(peft_model, dense, keep, comm)
    _overwrite(peft_model, open_refits(dense.after(keep), checkpoint / FOLDER), comm)
    return PruningCheckpoint(
        checkpoint, state, dense, engine, restores_optimizer=obstacle is not None
    )


def group_counts(shape: ModelShape) -> list[list[int]]:
    """Returns per layer the number of groups of each kind."""
    return [[layer[kind] for kind in shape.kinds] for layer in shape.counts]


@torch.no_grad()
def _overwrite(model: PeftModel, weights: ModelWeights, comm: Communicator) -> None:
    """Reads those linears again that `weights` has."""
    layers = decoder_layers(model)
    for i, linear in weights.shape.linears():
        stored_as = storage_format(base_linear(layers[i], linear.linear))
        for part in map(linear.stored_name, stored_as.tensors):
            name = f"{weights.shape.prefix(i)}{part}"
            if name in weights.files:
                parameter = base_parameter(layers[i], part)
                read = partial(weights.read_flat, name, dtype=parameter.dtype)
                holder(parameter).fill(parameter, read, comm)


def _find(folder: Path) -> Path | None:
    checkpoints = [folder / f"checkpoint-{step}" for step in layout.numbered(folder, "checkpoint")]
    for checkpoint in (folder, *reversed(checkpoints)):
        if (checkpoint / FOLDER).is_dir():
            return checkpoint
    is_checkpoint = folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name)
    if checkpoints or is_checkpoint or (folder / TRAINER_STATE).is_file():
        newest = checkpoints[-1] if checkpoints else folder
        raise UserError(
            f"{newest} has no {FOLDER}/: its save was interrupted, or LoraPruneCallback was absent"
        )
    return None


def _obstacle(
    checkpoint: Path,
    state: PruningState,
    files: TrainerFiles | None,
    comm: Communicator,
    engine: LiveEngine,
) -> str | None:
    """Says why this rank's trainer cannot load LoRA and its optimizer itself, if it cannot."""
    if files is not None:
        files.check_readable(checkpoint)
    zero = engine.name == "zero3"
    if state.zero != zero or (zero and state.world_size != comm.world_size):
        return (
            f"was saved on ZeRO-3 by {state.world_size} ranks"
            if state.zero
            else "was saved without ZeRO-3"
        )
    lacking = [] if files is None else files.lacks_state(checkpoint, comm.rank, engine)
    return f"has no {' and no '.join(lacking)}" if lacking else None


def _check_restorable(obstacle: str, state: PruningState, model: PeftModel, *, zero: bool) -> None:
    """Refuses a checkpoint whose folder `pruning/` has too little to go on from."""
    require(
        state.adam is not None,
        f"{obstacle}, and {FOLDER}/ has no state of torch's Adam; {COMPLETE}",
    )
    for name, parameter in model.named_parameters():
        require(
            ".lora_" in name or not parameter.requires_grad,
            f"{obstacle}, and {FOLDER}/ has Adam's state of LoRA, but not of {name}; {COMPLETE}",
        )
    halves = zero and any(parameter.dtype == torch.float16 for parameter in model.parameters())
    require(
        not halves, f"{obstacle}, and {FOLDER}/ has no loss scale for ZeRO-3 in fp16; {COMPLETE}"
    )


def _check_lora_ranks(checkpoint: Path, model: PeftModel, shape: ModelShape, *, zero: bool) -> None:
    """Refuses a model whose LoRA has other ranks than that in the checkpoint."""
    in_model = {
        name.replace(f".{ADAPTER}.", "."): full_shape(parameter)[0]
        for name, parameter in model.named_parameters()
        if f".lora_A.{ADAPTER}." in name
    }
    for path, ranks in _saved_ranks(checkpoint, shape, zero=zero).items():
        for name in filter(ranks.__contains__, in_model):
            linear = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            require(
                ranks[name] == in_model[name],
                f"{path}: LoRA on {linear} has rank {ranks[name]}, but the model's has {in_model[name]}; "
                "make the model with the same ranks",
            )


def _saved_ranks(checkpoint: Path, shape: ModelShape, *, zero: bool) -> dict[Path, dict[str, int]]:
    """Reads the rank of each LoRA factor A, named as in an adapter. On ZeRO-3 nothing reads the adapter itself."""
    paths = [] if zero else [checkpoint / ADAPTER_WEIGHTS]
    headers = {path: read_header(path) for path in paths if path.is_file()}
    for layer in range(len(shape.layers)):
        path = checkpoint / FOLDER / layout.layer_file("lora", layer)
        if path.is_file():
            headers[path] = {
                name_in_file(shape, layer, name): entry for name, entry in read_header(path).items()
            }
    return {
        path: {
            name: sizes[0] for name, (sizes, _) in header.items() if name.endswith(".lora_A.weight")
        }
        for path, header in headers.items()
    }


def _read(folder: Path, config: PruneConfig, comm: Communicator) -> PruningState:
    path = folder / FOLDER / layout.STATE_FILE
    state = layout.read_record(path, PruningState)
    state = replace(
        state,
        prune=layout.recorded_config({"output_dir": str(folder), "prune": state.prune}, path).prune,
    )
    # a default value leaves the choice to the checkpoint
    defaults, saved = asdict(PruneConfig()), asdict(state.prune)
    different = [
        key for key, value in asdict(config).items() if value not in (defaults[key], saved[key])
    ]
    require(not different, f"{folder} was saved with other settings: {', '.join(different)}")
    layout.verify(folder / FOLDER, part=comm.rank, parts=comm.world_size)
    return state
