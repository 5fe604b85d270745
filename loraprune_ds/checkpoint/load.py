"""Finds the newest undamaged checkpoint and reads its parts. Damaged checkpoints are reported and skipped."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import CheckpointMismatch, RunState, read_state, recorded_config
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.pretrained import PretrainedModel, open_for_pruning, open_pretrained, open_stored
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.step import PrunerState

if TYPE_CHECKING:  # a single process reads a checkpoint without DeepSpeed
    from loraprune_ds.zero.comm import Communicator


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A verified checkpoint."""

    folder: Path
    state: RunState

    @cached_property
    def config(self) -> RunConfig:
        """The settings of the run that wrote the checkpoint."""
        return recorded_config(self.state.config, self.folder / layout.STATE_FILE)

    def shape_folder(self) -> Path:
        """Returns the folder of the frozen weights. A moved source is found at `model.path`."""
        shape = self.state.shape
        if not shape.is_source:
            return self.folder.parent / shape.folder
        source = Path(shape.folder)
        return source if source.is_dir() else locate_model(self.config.model)

    def frozen_model(self, dense: PretrainedModel) -> PretrainedModel:
        """Returns the model without LoRA after the cuts of this checkpoint. `dense` is the model at `model.path`."""
        folder, keep = self.shape_folder(), keep_from_lists(self.state.kept, dense.shape.kinds)
        if not self.state.shape.is_source:
            return replace(dense, weights=open_stored(folder, dense.shape.after(keep), int8=dense.weights.int8))
        if folder.resolve() != dense.folder.resolve():
            dense = open_for_pruning(folder, self.config.model)
        return replace(dense, weights=dense.weights.cut(keep))

    def pruner_state(self, kinds: tuple[Kind, ...]) -> PrunerState:
        state, scores = self.state, read_scores(self.folder, kinds)
        return PrunerState(keep_from_lists(state.kept, kinds), scores, state.updates_since_cut, state.moment_tokens)

    def read_flat(self, layer: int, name: str, start: int, end: int) -> Tensor:
        """Reads the flat elements [start, end) of a layer's LoRA tensor, from only the rows that contain them."""
        with safe_open(self.folder / layout.layer_file(layer), framework="pt") as file:
            view = file.get_slice(name)
            columns = view.get_shape()[1]
            first = start // columns
            rows = view[first : -(-end // columns)].reshape(-1)
        return rows[start - first * columns : end - first * columns]


def find_newest(root: Path, comm: "Communicator", warn: Callable[[str], None]) -> TrainingCheckpoint | None:
    """Opens the newest undamaged checkpoint under `root`, read by all ranks. Collective. Raises CheckpointMismatch."""
    for number in reversed(comm.gather_objects(layout.numbered(root, "step"))[0]):
        try:
            return open_training_checkpoint(layout.step_folder(root, number), comm)
        except CheckpointMismatch:
            raise
        except UserError as error:
            warn(f"checkpoint step-{number} cannot be used: {error}")
    return None


def open_training_checkpoint(folder: Path, comm: "Communicator") -> TrainingCheckpoint:
    """Opens a checkpoint like `check_training_checkpoint`. Ranks share the reading and raise one error. Collective."""
    return comm.all_or_raise(lambda: check_training_checkpoint(folder, part=comm.rank, parts=comm.world_size))


def check_training_checkpoint(folder: Path, *, part: int = 0, parts: int = 1) -> TrainingCheckpoint:
    """Verifies one checkpoint and its frozen weights, or the share of one of `parts` readers.

    Raises:
        UserError: a file is missing or damaged. CheckpointMismatch: format or source model differ.
    """
    checkpoint = TrainingCheckpoint(folder, read_state(folder))
    layout.verify(folder, part=part, parts=parts)
    shape = checkpoint.state.shape
    if shape.is_source:
        _check_source(checkpoint)
        return checkpoint
    shape_folder = checkpoint.shape_folder()
    manifest = shape_folder / layout.MANIFEST
    if not manifest.is_file() or layout.sha256(manifest) != shape.digest:
        raise UserError(f"{shape_folder} is missing or not the folder that {folder} names")
    layout.verify(shape_folder, part=part, parts=parts)
    return checkpoint


def _check_source(checkpoint: TrainingCheckpoint) -> None:
    try:
        source = checkpoint.shape_folder()
        digest = source_digest(open_pretrained(source))
    except UserError as error:
        raise CheckpointMismatch(f"the source model of {checkpoint.folder} cannot be read: {error}") from None
    if digest != checkpoint.state.shape.digest:
        raise CheckpointMismatch(f"{source} is not the source model of {checkpoint.folder}: its tensors differ")


def source_digest(pretrained: PretrainedModel) -> str:
    """Identifies a source model by its config, and by names, sizes and first MiB of its files."""
    digest = hashlib.sha256((pretrained.folder / "config.json").read_bytes())
    for path in sorted(set(pretrained.weights.files.values())):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def keep_to_lists(keep: list[LayerKeep], kinds: tuple[Kind, ...]) -> list[list[list[int]]]:
    """Returns the kept groups by layer and kind, for JSON."""
    return [[layer[kind].tolist() for kind in kinds] for layer in keep]


def keep_from_lists(lists: list[list[list[int]]], kinds: tuple[Kind, ...]) -> list[LayerKeep]:
    return [LayerKeep(zip(kinds, map(torch.LongTensor, layer), strict=True)) for layer in lists]


def read_scores(folder: Path, kinds: tuple[Kind, ...]) -> list[LayerScores] | None:
    """Reads the moving averages. None if nothing was scored yet."""
    path = folder / layout.SCORES_FILE
    tensors = load_file(path) if path.exists() else {}
    layers = range(len(tensors) // len(kinds))
    return [LayerScores({kind: tensors[f"{i}.{kind}"] for kind in kinds}) for i in layers] or None


def read_moments(folder: Path, layer: int) -> dict[str, Tensor]:
    """Reads the input moments of a layer by linear, as sums over `moment_tokens`. Empty if none were recorded."""
    path = folder / layout.moments_file(layer)
    return load_file(path) if path.exists() else {}
