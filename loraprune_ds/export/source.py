"""Finds what a folder holds that can be exported: a merged model, or checkpoints whose LoRA is not merged."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.checkpoint.layout import layer_file, numbered, step_folder
from loraprune_ds.checkpoint.load import TrainingCheckpoint, check_training_checkpoint
from loraprune_ds.checkpoint.run_folder import CHECKPOINTS_FOLDER, MODEL_FOLDER, Status, read_status
from loraprune_ds.checkpoint.state import STATE_FILE
from loraprune_ds.config_file import config_from_dict, forget_removed
from loraprune_ds.errors import UserError
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.pretrained import open_for_pruning


@dataclass(frozen=True)
class ExportSource:
    """The folders that an export can read. The checkpoints, newest first, have the weights of `model` if it is set."""

    name: str  # for file names
    model: Path | None
    checkpoints: list[Path]


class UnmergedModel:
    """A verified checkpoint and its models: `dense`, which the run began with, and `base`, pruned and without LoRA.

    Raises:
        UserError: the dense model is gone or damaged.
    """

    def __init__(self, checkpoint: TrainingCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config_from_dict(forget_removed(checkpoint.state.config))
        self.dense = open_for_pruning(locate_model(self.config.model), self.config)
        self.base = checkpoint.frozen_weights(self.config)
        # The family is the dense model's, even where the smaller one had to be described as another.
        self.shape = self.dense.shape.with_layers(self.base.shape.layers)

    @property
    def exported(self) -> ExportedConfig:
        return export_config(self.dense.config, self.shape, self.config.model.dtype)

    def lora(self, layer: int) -> dict[str, Tensor]:
        """Reads a layer's fp32 masters: "{linear}.lora_A" (r, in_features), "{linear}.lora_B" (out_features, r)."""
        tensors = load_file(self.checkpoint.folder / layer_file(layer))
        return {name.removesuffix(".master"): t for name, t in tensors.items() if name.endswith(".master")}


def find_source(path: Path) -> ExportSource:
    """Looks at the folder of a run, of one of its checkpoints, or of a merged model."""
    name = path.resolve().name
    if status := read_status(path):
        return _find_run(path, name, status)
    if (path / STATE_FILE).is_file():
        return ExportSource(name, None, [path])
    if (path / "config.json").is_file():
        return ExportSource(name, path, [])
    raise UserError(f"{path} {'holds no run, checkpoint or model' if path.is_dir() else 'is no folder'}")


def open_newest(checkpoints: list[Path]) -> tuple[UnmergedModel, list[str]]:
    """Opens the first undamaged checkpoint. Returns remarks about it, and about those passed over, as well.

    Raises:
        UserError: all are damaged. The line is about the first one.
    """
    remarks: list[str] = []
    for path in checkpoints:
        try:
            unmerged = UnmergedModel(check_training_checkpoint(path))
        except UserError as error:
            remarks.append(f"{path.name} cannot be used: {error}")
            continue
        return unmerged, [*remarks, f"taken from {path.name}"]
    raise UserError(remarks[0])


def _find_run(path: Path, name: str, status: Status) -> ExportSource:
    steps = sorted(numbered(path / CHECKPOINTS_FOLDER, "step"), reverse=True)
    checkpoints = [step_folder(path / CHECKPOINTS_FOLDER, step) for step in steps]
    if status.state == "finished":
        return ExportSource(name, path / MODEL_FOLDER, checkpoints[:1] if steps[:1] == [status.step] else [])
    if not checkpoints:
        raise UserError(f"{path} holds an unfinished run ({status}) without a checkpoint: nothing to export yet")
    return ExportSource(name, None, checkpoints)
