"""Finds the newest undamaged step, reads its parts, and is the model that exports read. Needs no DeepSpeed."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.layout import CheckpointMismatch, recorded_config
from loraprune_ds.checkpoint.state import ResumeState, State, read_resume_state, read_state
from loraprune_ds.config import RunConfig
from loraprune_ds.engine.optimizer_state import optimizer_kind
from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import STATE_FILE
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import Kind, LayerKeep
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning, open_quantised
from loraprune_ds.pretrained.sources import locate_model
from loraprune_ds.pretrained.text_part import Tower
from loraprune_ds.pretrained.weight_files import read_header, read_samples, weight_file_names
from loraprune_ds.pretrained.weights import ModelWeights
from loraprune_ds.pruning.layer_scores import LayerScores
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import layer_owner


@dataclass(frozen=True)
class SavedStep:
    """A step of a run, or the folder `pruning/` in the checkpoint of another trainer. Its files are verified."""

    folder: Path
    state: State

    @property
    def resume_folder(self) -> Path:
        """The folder of the files that only a resume needs."""
        return self.folder / layout.RESUME_FOLDER

    def resume_state(self) -> ResumeState:
        return read_resume_state(self.resume_folder)

    def lora(self, layer: int) -> dict[str, Tensor]:
        """Reads a layer's fp32 masters: "{linear}.lora_A" (r, in_features), "{linear}.lora_B" (out_features, r)."""
        return load_file(self.folder / layout.layer_file("lora", layer))

    def scaling(self, layer: int, linear: str) -> float:
        """Returns lora_alpha / r of a linear."""
        return self.state.scalings.get(f"{layer}.{linear}", self.state.scaling)

    def what_trains(self, layer: int) -> dict[str, Tensor]:
        """Maps the masters of a layer, and states such as "{linear}.lora_A.exp_avg". The rest stays on disk."""
        names = [layout.layer_file(part, layer) for part in ("lora", "trained")]
        paths = [folder / name for folder in (self.folder, self.resume_folder) for name in names]
        found = dict[str, Tensor]()
        for path in filter(Path.exists, paths):
            found |= load_file(path)
        return found

    def keep(self, kinds: tuple[Kind, ...]) -> list[LayerKeep]:
        """Returns the kept groups of each layer of the dense model."""
        return keep_from_lists(self.state.kept, kinds)

    def refits(self, shape: ModelShape) -> ModelWeights:
        """Opens the refitted linears. They hold no other weights of the model."""
        return open_tensors(shape, self.folder, layout.REFITS)

    def restore_trained(self, model: PrunableModel) -> None:
        """Restores what trains, and the optimizer, on any number of ranks. Collective.

        Raises:
            UserError: another optimizer trains, or other tensors do.
        """
        resume = self.resume_state()
        state = model.optimizer_state
        others = model.trained_parameters()
        trained = list(chain.from_iterable(others))
        kind = optimizer_kind(state.optimizer)
        require(
            resume.optimizer == kind,
            f"{self.folder} was saved by {resume.optimizer}; {kind} cannot go on from it",
        )
        require(
            self.state.trained == trained,
            f"{self.folder} was saved with {self.state.trained} training beside LoRA, but now {trained} do",
        )
        lora = [*model.lora_parameters(), {}]
        layers = [first | second for first, second in zip(lora, others, strict=True)]
        state.restore(layers, self.what_trains)
        state.restore_groups(resume.groups)
        model.restore_scaler(resume.loss_scale)

    def restore_pruner(self, pruner: Pruner) -> None:
        """Restores the pruner of a model that has been cut, on any number of ranks."""
        counters = self.resume_state()
        kinds = pruner.limits.dense.kinds
        path = self.resume_folder / layout.SCORES_FILE
        pruner.kept_of_dense = self.keep(kinds)
        pruner.average.scores = _read_scores(path, kinds) if path.exists() else None
        pruner.average.updates_since_cut = counters.updates_since_cut
        if pruner.passes is not None:
            paths = sorted(self.resume_folder.glob(layout.PASSES_OF_ALL))
            read = partial(torch.load, map_location=pruner.model.device, weights_only=True)
            pruner.passes.restore([partial(read, path) for path in paths])


@dataclass(frozen=True)
class TrainingCheckpoint(SavedStep):
    """A step with its dense model on disk. It is a `LayerSource` (export/huggingface.py)."""

    config: RunConfig  # the settings of the run that wrote the step
    source: Path  # folder of the dense model at the start of the run, or where it was moved
    dense: PretrainedModel  # at `model.path` of the run that goes on, or in `source`

    @cached_property
    def frozen_model(self) -> PretrainedModel:
        """The model without LoRA after the cuts of this step."""
        dense = self.dense
        if self.source.resolve() != dense.folder.resolve():
            dense = _open_dense(self.source, self.config, self.state)
        weights = dense.weights.cut(self.keep(dense.shape.kinds))
        return replace(dense, weights=weights.overlaid(self.refits(weights.shape)))

    @cached_property
    def _merged_weights(self) -> ModelWeights:
        """The frozen weights, with the trained copies of other modules."""
        trained = open_tensors(self.shape, self.folder, layout.TRAINED)
        return self.frozen_model.weights.overlaid(trained)

    @property
    def shape(self) -> ModelShape:
        return self.frozen_model.shape

    @property
    def exported(self) -> ExportedConfig:
        tower = self.tower and self.tower.config
        return export_config(self.dense.config, self.shape, self.config.model.dtype, tower)

    @property
    def dense_folder(self) -> Path:
        return self.dense.folder

    @property
    def tower(self) -> Tower | None:
        return self.dense.tower

    def layer(self, number: int, ranks: Communicator, *, merge: bool) -> dict[str, Tensor]:
        shape = self.shape
        if layer_owner(number, ranks.world_size) != ranks.rank:
            return {}
        weights = self._merged_weights if merge else self.frozen_model.weights
        if number == len(shape.layers):
            return self._read(weights, (tensor.name for tensor in shape.outer))
        prefix = shape.prefix(number)
        tensors = self._read(weights, (prefix + x.name for x in shape.layers[number].tensors))
        return self._add_lora(tensors, number) if merge else tensors

    def _add_lora(self, tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
        prefix = self.shape.prefix(layer)
        lora = self.lora(layer)
        for linear in self.shape.layers[layer].linears:
            a = lora[f"{linear.linear}.lora_A"]
            b = lora[f"{linear.linear}.lora_B"]
            scaling = self.scaling(layer, linear.linear)
            name = prefix + linear.name
            weight = tensors[name]
            tensors[name] = merge_lora(weight, a, b, scaling, weight.dtype)
        return tensors

    def _read(self, weights: ModelWeights, names: Iterable[str]) -> dict[str, Tensor]:
        dtype = DTYPES[self.config.model.dtype]
        return {name: weights.read_full(name, dtype) for name in names}


def verify_step(folder: Path, ranks: Communicator, *, resume: bool = False) -> SavedStep:
    """Verifies this rank's part of a step's files, with `resume` to go on from it.

    Raises:
        UserError: a file is missing or damaged. CheckpointMismatch: another format.
    """
    step = SavedStep(folder, read_state(folder))
    verified = [folder]
    if resume:
        step.resume_state()
        verified.append(step.resume_folder)
    for files in verified:
        layout.verify(files, part=ranks.rank, parts=ranks.world_size)
    return step


def open_checkpoint(
    folder: Path, ranks: Communicator, dense: PretrainedModel | None = None, *, resume: bool = False
) -> TrainingCheckpoint:
    """Verifies a step, and finds its dense model. Ranks share the reading and raise one error. Collective.

    Args:
        dense: the model at the run's `model.path`, if it is open. Default: that in `source`.
        resume: to go on from it.

    Raises:
        UserError: a file is missing or damaged. CheckpointMismatch: format or source model differ.
    """

    def check() -> TrainingCheckpoint:
        step = verify_step(folder, ranks, resume=resume)
        origin = step.state.origin
        config = recorded_config(origin.config, folder / STATE_FILE)
        source = _find_source(folder, step.state, config)
        model = dense or _open_dense(source, config, step.state)
        return TrainingCheckpoint(**vars(step), config=config, source=source, dense=model)

    return ranks.all_or_raise(check)


def _open_dense(source: Path, config: RunConfig, state: State) -> PretrainedModel:
    """Opens the dense model as it was stored when the training began."""
    origin = state.origin
    if origin.bits is None:
        dense = open_for_pruning(source, config.model, query_heads=origin.query_heads)
        return dense.with_refits(config.prune.compensate)
    return open_quantised(
        source, origin.bits, state.formats, config.model.dtype, query_heads=origin.query_heads
    )


def _find_source(folder: Path, state: State, config: RunConfig) -> Path:
    """Returns the folder of the dense model. A moved one is found at `model.path`.

    Raises CheckpointMismatch if the model is gone or has changed.
    """
    origin = state.origin
    if origin.folder is None or origin.digest is None:
        raise CheckpointMismatch(
            f"{folder} names no folder with the weights of its dense model; "
            "resume the training, and call save_model of its callback or Pruning"
        )
    try:
        source = Path(origin.folder)
        if not source.is_dir():
            source = locate_model(config.model)
        is_same = source_digest(source) == origin.digest
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
    return digest.hexdigest()


def open_tensors(shape: ModelShape, folder: Path, pattern: str) -> ModelWeights:
    """Opens the tensors in the files of a folder, by the names that they have there."""
    files = {name: path for path in folder.glob(pattern) for name in read_header(path)}
    return ModelWeights(shape, files, {name: name for name in files}, {})


def keep_to_lists(keep: list[LayerKeep], kinds: tuple[Kind, ...]) -> list[list[list[int]]]:
    """Returns the kept groups by layer and kind, for JSON."""
    return [[layer[kind].tolist() for kind in kinds] for layer in keep]


def counts_to_lists(shape: ModelShape) -> list[list[int]]:
    """Returns the number of groups by layer and kind, for JSON."""
    return [[layer[kind] for kind in shape.kinds] for layer in shape.counts]


def keep_from_lists(lists: list[list[list[int]]], kinds: tuple[Kind, ...]) -> list[LayerKeep]:
    return [LayerKeep(zip(kinds, map(torch.LongTensor, layer), strict=True)) for layer in lists]


def _read_scores(path: Path, kinds: tuple[Kind, ...]) -> list[LayerScores]:
    tensors = load_file(path)
    layers = range(len(tensors) // len(kinds))
    return [LayerScores({kind: tensors[f"{i}.{kind}"] for kind in kinds}) for i in layers]
