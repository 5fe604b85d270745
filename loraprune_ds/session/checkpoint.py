"""Cuts a fresh model to match the checkpoint of another trainer, which has our state in its folder `pruning/`.

checkpoint-120/pruning/    a step like our trainer's, with metrics.jsonl (checkpoint/README.md)

The trainer saves LoRA, its optimizer and its own state. `pruning/` is written last, so it marks a complete checkpoint.
From its files another engine, or other ranks, go on.
"""

import re
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.checkpoint.load import SavedStep, counts_to_lists, source_digest, verify_step
from loraprune_ds.checkpoint.state import Origin
from loraprune_ds.config import PruneConfig
from loraprune_ds.engine.live import LiveEngine
from loraprune_ds.engines import full_shape, future_engine, holder
from loraprune_ds.errors import require
from loraprune_ds.files import STATE_FILE, is_ours
from loraprune_ds.model.adapters import ADAPTER, base_linear, base_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.frozen import storage_format
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import name_in_file
from loraprune_ds.pretrained.weight_files import read_header
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report.records import METRICS_FILE, History, read_history
from loraprune_ds.session.live import find_peft_model, live_shape
from loraprune_ds.session.origin import base_folder
from loraprune_ds.session.quantised import adopt_quantised
from loraprune_ds.session.state import storage_formats

NO_PRUNING = (
    f"has no {PRUNING_FOLDER}/: its save was interrupted, or LoraPruneCallback was absent; "
    "delete it to begin anew"
)


@dataclass(frozen=True)
class PruningCheckpoint(SavedStep):
    """A verified checkpoint that the live model matches after cuts.

    Attributes:
        folder: `pruning/` in the checkpoint of the trainer.
        prune: the settings that it was saved with.
        dense: the shape before any cut.
        engine: which will train the model.
    """

    prune: PruneConfig
    dense: ModelShape
    engine: LiveEngine

    @property
    def of_trainer(self) -> Path:
        """The folder of the trainer's checkpoint."""
        return self.folder.parent

    def history(self) -> History:
        """Reads the records so far."""
        return read_history(self.folder / METRICS_FILE)

    def check_schedule(self, steps: int, seed: int) -> None:
        """Raises UserError if a training with these settings would make other cuts."""
        origin = self.state.origin
        require(
            origin.steps == steps,
            f"the checkpoint's schedule has {origin.steps} steps, not {steps}",
        )
        require(origin.seed == seed, f"the checkpoint's seed is {origin.seed}, not {seed}")


def cut_to_checkpoint(
    model: nn.Module, folder: Path, config: PruneConfig, comm: Communicator
) -> PruningCheckpoint | None:
    """Cuts a dense PEFT model to match a checkpoint, before its training begins. None without a checkpoint. Collective.

    Arguments and errors are as in `LoraPruneCallback.resume`. The weights may already be sharded.
    """
    checkpoint = comm.all_or_raise(lambda: _find(folder))
    if checkpoint is None:
        return None
    peft_model = find_peft_model(model)
    step, prune = comm.all_or_raise(lambda: _read(checkpoint, config, comm))
    state = step.state
    engine = future_engine(peft_model)
    if not state.origin.query_heads:
        # `live_shape` reads it
        setattr(cast(Any, peft_model.get_base_model()).config, QUERY_HEADS_LEAVE, False)
    adopt_quantised(peft_model, refits=prune.compensate != "none")
    dense = live_shape(peft_model)
    formats = storage_formats(decoder_layers(peft_model), dense)
    require(
        formats == state.formats,
        f"{checkpoint} has weights stored as {_describe(state.formats)}, but the model as {_describe(formats)}; "
        "load the base as it was loaded for that training",
    )
    require(
        counts_to_lists(dense) == state.origin.groups,
        f"{checkpoint} belongs to another model: its layers have other sizes",
    )
    comm.all_or_raise(lambda: _check_lora_ranks(step, peft_model, dense))
    comm.on_rank_0(lambda: _check_base(checkpoint, state.origin, peft_model))
    keep = step.keep(dense.kinds)
    engine.cut_before_training(peft_model, dense, keep, comm)
    _overwrite(peft_model, step.refits(dense.after(keep)), comm)
    return PruningCheckpoint(**vars(step), prune=prune, dense=dense, engine=engine)


def _describe(formats: dict[str, str]) -> str:
    return " and ".join(sorted(set(formats.values()))) or "plain numbers"


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
                holder(parameter).layout(parameter, comm).fill(parameter, read)


def _find(folder: Path) -> Path | None:
    checkpoints = [folder / f"checkpoint-{step}" for step in layout.numbered(folder, "checkpoint")]
    for checkpoint in (folder, *reversed(checkpoints)):
        # TensorBoard may write into a folder of this name
        if is_ours(checkpoint / PRUNING_FOLDER):
            return checkpoint
    is_checkpoint = folder.is_dir() and re.fullmatch(r"checkpoint-\d+", folder.name)
    newest = checkpoints[-1] if checkpoints else folder
    require(not (checkpoints or is_checkpoint), f"{newest} {NO_PRUNING}")
    return None


def _check_base(checkpoint: Path, origin: Origin, model: PeftModel) -> None:
    """Refuses a dense model whose files have other weights than those that the training began with."""
    base = base_folder(model)
    if base is not None and origin.digest is not None:
        require(
            source_digest(base) == origin.digest,
            f"{base} is not the source model of {checkpoint}: its tensors differ",
        )


def _check_lora_ranks(step: SavedStep, model: PeftModel, shape: ModelShape) -> None:
    """Refuses a model whose LoRA has other ranks than that in the checkpoint."""
    in_model = {
        name.replace(f".{ADAPTER}.", "."): full_shape(parameter)[1]
        for name, parameter in model.named_parameters()
        if f".lora_B.{ADAPTER}." in name
    }
    for path, ranks in _saved_ranks(step, shape).items():
        for name in filter(ranks.__contains__, in_model):
            linear = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            require(
                ranks[name] == in_model[name],
                f"{path}: LoRA on {linear} has rank {ranks[name]}, but the model's has {in_model[name]}; "
                "make the model with the same ranks",
            )


def _saved_ranks(step: SavedStep, shape: ModelShape) -> dict[Path, dict[str, int]]:
    """Reads the rank of each LoRA factor B, named as in an adapter."""
    ranks = dict[Path, dict[str, int]]()
    for layer in range(len(shape.layers)):
        path = step.folder / layout.layer_file("lora", layer)
        header = read_header(path) if path.is_file() else {}
        names = {
            name_in_file(shape, layer, name): sizes[1]
            for name, (sizes, _) in header.items()
            if ".lora_B" in name
        }
        ranks[path] = names
    return ranks


def _read(
    checkpoint: Path, config: PruneConfig, comm: Communicator
) -> tuple[SavedStep, PruneConfig]:
    """Verifies a checkpoint. Also returns its settings. A default value leaves the choice to it."""
    step = verify_step(checkpoint / PRUNING_FOLDER, comm, resume=True)
    settings = layout.recorded_config(step.state.origin.config, step.folder / STATE_FILE)
    prune = settings.prune
    defaults = asdict(PruneConfig())
    saved = asdict(prune)
    different = [
        key for key, value in asdict(config).items() if value not in (defaults[key], saved[key])
    ]
    require(not different, f"{checkpoint} was saved with other settings: {', '.join(different)}")
    return step, prune
