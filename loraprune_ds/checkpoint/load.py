"""Finds the newest undamaged step, reads its parts, and is the model that exports read. Needs no DeepSpeed."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import CheckpointMismatch, RunState, read_state, recorded_config
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.pretrained import ModelWeights, PretrainedModel, open_for_pruning
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.sources import locate_model
from loraprune_ds.model.text_part import Tower
from loraprune_ds.model.weight_files import read_header, weight_file_names
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.step import PrunerState
from loraprune_ds.ranks import Ranks


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A verified step of a run."""

    folder: Path
    state: RunState

    @cached_property
    def config(self) -> RunConfig:
        """The settings of the run that wrote the step."""
        return recorded_config(self.state.config, self.folder / layout.STATE_FILE)

    @property
    def resume_folder(self) -> Path:
        """The files that only a resume needs. The step of an earlier size has lost them."""
        return self.folder / layout.RESUME_FOLDER

    def source_folder(self) -> Path:
        """Returns the folder of the dense model. A moved one is found at `model.path`."""
        source = Path(self.state.source)
        return source if source.is_dir() else locate_model(self.config.model)

    def frozen_model(self, dense: PretrainedModel) -> PretrainedModel:
        """Returns the model without LoRA after the cuts of this step. `dense` is the model at `model.path`."""
        source, keep = self.source_folder(), keep_from_lists(self.state.kept, dense.shape.kinds)
        if source.resolve() != dense.folder.resolve():
            dense = open_for_pruning(source, self.config.model)
        weights = dense.weights.cut(keep)
        return replace(dense, weights=weights.overlaid(open_refits(weights.shape, self.folder)))

    def lora(self, layer: int) -> dict[str, Tensor]:
        """Reads a layer's fp32 masters: "{linear}.lora_A" (r, in_features), "{linear}.lora_B" (out_features, r)."""
        return load_file(self.folder / layout.layer_file("lora", layer))

    def read_flat(self, layer: int, name: str, key: str, start: int, end: int) -> Tensor:
        """Reads the flat elements [start, end) of a layer's LoRA state, from only the rows that contain them."""
        path, own = self.folder / layout.layer_file("lora", layer), name
        if key != "master":
            path, own = self.resume_folder / layout.layer_file("adam", layer), f"{name}.{key}"
        with safe_open(path, framework="pt") as file:
            view = file.get_slice(own)
            columns = view.get_shape()[1]
            first = start // columns
            rows = view[first : -(-end // columns)].reshape(-1)
        return rows[start - first * columns : end - first * columns]

    def pruner_state(self, kinds: tuple[Kind, ...]) -> PrunerState:
        counters = layout.read_resume_state(self.folder)
        kept, scores = keep_from_lists(self.state.kept, kinds), read_scores(self.resume_folder, kinds)
        return PrunerState(kept, scores, counters.updates_since_cut, counters.moment_tokens)


@dataclass(frozen=True)
class Step:
    """A verified checkpoint with the `dense` model of its run. It is a `LayerSource` (export/huggingface.py)."""

    checkpoint: TrainingCheckpoint
    dense: PretrainedModel

    @cached_property
    def base(self) -> ModelWeights:
        """The pruned weights without LoRA."""
        return self.checkpoint.frozen_model(self.dense).weights

    @property
    def shape(self) -> ModelShape:
        return self.base.shape

    @property
    def exported(self) -> ExportedConfig:
        dtype, tower = self.checkpoint.config.model.dtype, self.tower
        return export_config(self.dense.config, self.shape, dtype, tower and tower.config)

    @property
    def folder(self) -> Path:
        return self.dense.folder

    @property
    def tower(self) -> Tower | None:
        return self.dense.tower

    def files(self, ranks: Ranks, *, merge: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
        layers = len(self.shape.layers)
        for k in range(ranks.rank, layers, ranks.world_size):
            yield k, self._layer(k, merge=merge)
        if layers % ranks.world_size == ranks.rank:
            yield layers, self._read(tensor.name for tensor in self.shape.outer)

    def _layer(self, layer: int, *, merge: bool) -> dict[str, Tensor]:
        tensors = self._read(name for name, _ in self.shape.layer_tensors(layer))
        if merge:
            lora, config = self.checkpoint.lora(layer), self.checkpoint.config.lora
            scaling = config.lora_alpha / config.r
            for linear in self.shape.layers[layer].linears:
                name, (a, b) = f"{self.shape.prefix(layer)}{linear.name}", (f"{linear.linear}.lora_{x}" for x in "AB")
                tensors[name] = merge_lora(tensors[name], lora[a], lora[b], scaling, tensors[name].dtype)
        return tensors

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.base.read_full(name, DTYPES[self.checkpoint.config.model.dtype]) for name in names}


def open_step(folder: Path) -> Step:
    """Verifies a checkpoint, and opens the model at its run's `model.path`. Raises UserError if one is unusable."""
    checkpoint = open_checkpoint(folder, Ranks())
    model = checkpoint.config.model
    return Step(checkpoint, open_for_pruning(locate_model(model), model))


def find_newest(root: Path, comm: Ranks, warn: Callable[[str], None]) -> TrainingCheckpoint | None:
    """Opens the newest undamaged step under `root`, read by all ranks. Collective. Raises CheckpointMismatch."""
    numbers = comm.gather_objects(layout.numbered(root, "step"))[0]
    for number in reversed(numbers):
        try:
            return open_checkpoint(layout.step_folder(root, number), comm, resume=True)
        except CheckpointMismatch:
            raise
        except UserError as error:
            warn(f"checkpoint step-{number} cannot be used: {error}")
    return None


def open_checkpoint(folder: Path, ranks: Ranks, *, resume: bool = False) -> TrainingCheckpoint:
    """Verifies a step, with `resume` to go on from it. Ranks share the reading and raise one error. Collective.

    Raises:
        UserError: a file is missing or damaged. CheckpointMismatch: format or source model differ.
    """

    def check() -> TrainingCheckpoint:
        checkpoint = TrainingCheckpoint(folder, read_state(folder))
        if resume:
            layout.read_resume_state(folder)
        for files in (folder, checkpoint.resume_folder) if resume else (folder,):
            layout.verify(files, part=ranks.rank, parts=ranks.world_size)
        _check_source(checkpoint)
        return checkpoint

    return ranks.all_or_raise(check)


def _check_source(checkpoint: TrainingCheckpoint) -> None:
    """Raises CheckpointMismatch if the source model of a step is gone or has changed."""
    try:
        source = checkpoint.source_folder()
        is_same = source_digest(source) == checkpoint.state.data.source
    except (UserError, OSError) as error:
        raise CheckpointMismatch(f"the source model of {checkpoint.folder} cannot be read: {error}") from None
    if not is_same:
        raise CheckpointMismatch(f"{source} is not the source model of {checkpoint.folder}: its tensors differ")


def source_digest(folder: Path) -> str:
    """Identifies a source model by its config, and by names, sizes and first MiB of its weight files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in (folder / name for name in sorted(weight_file_names(folder))):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def open_refits(shape: ModelShape, folder: Path) -> ModelWeights:
    """Opens the refitted linears in a folder, which hold no other weights of the model."""
    files = {name: path for path in folder.glob(layout.REFITS) for name in read_header(path)}
    return ModelWeights(shape, files, {name: name for name in files}, {})


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
    """Reads the halves of a layer's input moments by linear (`InputMoments.restore`). Empty if none were recorded."""
    path = folder / layout.layer_file("inputs", layer)
    return load_file(path) if path.exists() else {}
