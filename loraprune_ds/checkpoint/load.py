"""Finds the newest undamaged step, reads its parts, and is the model that exports read. Needs no DeepSpeed."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import CheckpointMismatch, RunState, recorded_config
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError, one_line
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning
from loraprune_ds.pretrained.sources import locate_model
from loraprune_ds.pretrained.text_part import Tower
from loraprune_ds.pretrained.weight_files import read_header, read_samples, weight_file_names
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.comm import Communicator

# begins a digest. The first steps of format 7 have another kind, without a mark
SAMPLES = "samples:"


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A verified step of a run. It is a `LayerSource` (export/huggingface.py)."""

    folder: Path
    state: RunState
    config: RunConfig  # the settings of the run that wrote the step
    source: Path  # folder of the dense model at the start of the run, or where it was moved
    dense: PretrainedModel  # at `model.path`

    @property
    def resume_folder(self) -> Path:
        """The files that only a resume needs. The step of an earlier size has lost them."""
        return self.folder / layout.RESUME_FOLDER

    @cached_property
    def frozen_model(self) -> PretrainedModel:
        """The model without LoRA after the cuts of this step."""
        dense = self.dense
        if self.source.resolve() != dense.folder.resolve():
            dense = open_for_pruning(
                self.source, self.config.model, query_heads=self.state.query_heads
            )
        weights = dense.weights.cut(keep_from_lists(self.state.kept, dense.shape.kinds))
        refits = open_refits(weights.shape, self.folder)
        return replace(dense, weights=weights.overlaid(refits))

    @property
    def shape(self) -> ModelShape:
        return self.frozen_model.shape

    @property
    def exported(self) -> ExportedConfig:
        tower_config = self.tower.config if self.tower else None
        return export_config(self.dense.config, self.shape, self.config.model.dtype, tower_config)

    @property
    def dense_folder(self) -> Path:
        return self.dense.folder

    @property
    def tower(self) -> Tower | None:
        return self.dense.tower

    def files(
        self, ranks: Communicator, *, merge: bool = True
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        layers = len(self.shape.layers)
        for number in range(ranks.rank, layers + 1, ranks.world_size):
            if number < layers:
                yield number, self._layer(number, merge)
            else:
                yield number, self._read(tensor.name for tensor in self.shape.outer)

    def lora(self, layer: int) -> dict[str, Tensor]:
        """Reads a layer's fp32 masters: "{linear}.lora_A" (r, in_features), "{linear}.lora_B" (out_features, r)."""
        return load_file(self.folder / layout.layer_file("lora", layer))

    def read_flat(self, layer: int, name: str, key: str, start: int, end: int) -> Tensor:
        return read_flat(self.folder, self.resume_folder, layer, name, key, start, end)

    def restore_pruner(self, pruner: Pruner) -> None:
        """Restores the pruner of a model that was built from this step."""
        counters = layout.read_resume_state(self.folder)
        restore_pruner(
            pruner,
            self.resume_folder,
            self.state.kept,
            counters.updates_since_cut,
            counters.moment_tokens,
        )

    def _layer(self, layer: int, merge: bool) -> dict[str, Tensor]:
        prefix = self.shape.prefix(layer)
        spec = self.shape.layers[layer]
        tensors = self._read(prefix + tensor.name for tensor in spec.tensors)
        if not merge:
            return tensors
        lora = self.lora(layer)
        scaling = self.config.lora.lora_alpha / self.config.lora.r
        for linear in spec.linears:
            a = lora[f"{linear.linear}.lora_A"]
            b = lora[f"{linear.linear}.lora_B"]
            weight = tensors[prefix + linear.name]
            tensors[prefix + linear.name] = merge_lora(weight, a, b, scaling, weight.dtype)
        return tensors

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        weights = self.frozen_model.weights
        dtype = DTYPES[self.config.model.dtype]
        return {name: weights.read_full(name, dtype) for name in names}


def open_checkpoint(
    folder: Path, ranks: Communicator, dense: PretrainedModel | None = None, *, resume: bool = False
) -> TrainingCheckpoint:
    """Verifies a step, with `resume` to go on from it. Ranks share the reading and raise one error. Collective.

    Args:
        dense: the model at the run's `model.path`, if it is open.

    Raises:
        UserError: a file is missing or damaged. CheckpointMismatch: format or source model differ.
    """

    def check() -> TrainingCheckpoint:
        state_file = folder / layout.STATE_FILE
        state = layout.read_record(state_file, RunState)
        verified = [folder]
        if resume:
            layout.read_resume_state(folder)
            verified.append(folder / layout.RESUME_FOLDER)
        for files in verified:
            layout.verify(files, part=ranks.rank, parts=ranks.world_size)
        config = recorded_config(state.config, state_file)
        source = _find_source(folder, state, config)
        model = dense or open_for_pruning(
            locate_model(config.model), config.model, query_heads=state.query_heads
        )
        return TrainingCheckpoint(folder, state, config, source, model)

    return ranks.all_or_raise(check)


def _find_source(folder: Path, state: RunState, config: RunConfig) -> Path:
    """Returns the folder of the dense model. A moved one is found at `model.path`.

    Raises CheckpointMismatch if the model is gone or has changed.
    """
    try:
        source = Path(state.source)
        if not source.is_dir():
            source = locate_model(config.model)
        digest = source_digest if state.data.source.startswith(SAMPLES) else _digest_of_beginnings
        is_same = digest(source) == state.data.source
    except (UserError, OSError) as error:
        raise CheckpointMismatch(
            f"the source model of {folder} cannot be read: {one_line(error)}"
        ) from None
    if not is_same:
        raise CheckpointMismatch(
            f"{source} is not the source model of {folder}: its tensors differ"
        )
    return source


def source_digest(folder: Path) -> str:
    """Identifies a source model by its config, and by names, headers and samples of its weight files.

    A merged LoRA, more tuning or another quantization changes nearly all bytes of a tensor, so samples show it. They
    miss a change of a few rows, for example of single tokens in the embedding.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(weight_file_names(folder)):
        path = folder / name
        digest.update(path.name.encode())
        for part in read_samples(path):
            digest.update(part)
    return SAMPLES + digest.hexdigest()


def _digest_of_beginnings(folder: Path) -> str:
    """Identifies a source model like the first steps of format 7: by the first MiB of each weight file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(weight_file_names(folder)):
        path = folder / name
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def open_refits(shape: ModelShape, folder: Path) -> ModelWeights:
    """Opens the refitted linears in a folder, which hold no other weights of the model."""
    files = {name: path for path in folder.glob(layout.REFITS) for name in read_header(path)}
    return ModelWeights(shape, files, {name: name for name in files}, {})


def read_flat(
    lora: Path, adam: Path, layer: int, name: str, key: str, start: int, end: int
) -> Tensor:
    """Reads the flat elements [start, end) of a layer's LoRA state. The file is mapped, so it reads no others."""
    path = lora / layout.layer_file("lora", layer)
    if key != "master":
        path = adam / layout.layer_file("adam", layer)
        name = f"{name}.{key}"
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name).view(-1)[start:end].clone()


def keep_to_lists(keep: list[LayerKeep], kinds: tuple[Kind, ...]) -> list[list[list[int]]]:
    """Returns the kept groups by layer and kind, for JSON."""
    return [[layer[kind].tolist() for kind in kinds] for layer in keep]


def keep_from_lists(lists: list[list[list[int]]], kinds: tuple[Kind, ...]) -> list[LayerKeep]:
    return [LayerKeep(zip(kinds, map(torch.LongTensor, layer), strict=True)) for layer in lists]


def restore_pruner(
    pruner: Pruner,
    folder: Path,
    kept: list[list[list[int]]],
    updates_since_cut: int,
    moment_tokens: float,
) -> None:
    """Restores the pruner of a model that has been cut, on any number of ranks.

    `folder` has its moving averages and input moments, if any.
    """
    kinds = pruner.limits.dense.kinds
    path = folder / layout.SCORES_FILE
    pruner.kept_of_dense = keep_from_lists(kept, kinds)
    pruner.average.scores = _read_scores(path, kinds) if path.exists() else None
    pruner.average.updates_since_cut = updates_since_cut

    def read_moments(layer: int) -> dict[str, Tensor]:
        path = folder / layout.layer_file("inputs", layer)
        return load_file(path) if path.exists() else {}

    if pruner.moments is not None:
        pruner.moments.restore(read_moments, moment_tokens)


def _read_scores(path: Path, kinds: tuple[Kind, ...]) -> list[LayerScores]:
    tensors = load_file(path)
    layers = range(len(tensors) // len(kinds))
    return [LayerScores({kind: tensors[f"{i}.{kind}"] for kind in kinds}) for i in layers]
