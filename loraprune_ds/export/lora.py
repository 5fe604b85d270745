"""Finds the weights to export, and writes a checkpoint's LoRA, merged into W or as PEFT's adapter."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.load import TrainingCheckpoint, check_training_checkpoint
from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError
from loraprune_ds.export.huggingface import finish_folder
from loraprune_ds.export.model_card import card_of_run
from loraprune_ds.files import write_json
from loraprune_ds.model.adapters import ADAPTER_FILE, BASE_FOLDER, last_names, name_in_file, task_type
from loraprune_ds.model.experts import as_in_peft, in_peft
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.pretrained import open_for_pruning
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.text_part import in_files
from loraprune_ds.model.weight_files import copy_tensors, weight_file_count, write_index, write_weight_file


@dataclass(frozen=True)
class ExportSource:
    """The folders to export from. With `model` the checkpoints, newest first, have its weights."""

    name: str  # for file names
    model: Path | None
    checkpoints: list[Path]
    mtp: Path | None = None  # a dense model, to keep its layers that predict further tokens (mtp.py)


def find_source(path: Path) -> ExportSource:
    """Finds the source in the folder of a run, of one of its checkpoints, or of a merged model."""
    name, root = path.resolve().name, path / layout.CHECKPOINTS_FOLDER
    if status := layout.read_status(path):
        steps = layout.numbered(root, "step")[::-1]
        checkpoints = [layout.step_folder(root, step) for step in steps]
        if status.state == "finished":
            model = path / layout.MODEL_FOLDER
            return ExportSource(name, model, checkpoints[:1] if steps[:1] == [status.step] else [])
        if not checkpoints:
            raise UserError(f"{path} holds an unfinished run ({status}) without a checkpoint: nothing to export yet")
        return ExportSource(name, None, checkpoints)
    if (path / layout.STATE_FILE).is_file():
        return ExportSource(name, None, [path])
    if (path / "config.json").is_file():
        return ExportSource(name, path, [])
    raise UserError(f"{path} {'holds no run, checkpoint or model' if path.is_dir() else 'is no folder'}")


class UnmergedModel:
    """A verified checkpoint and its models: `dense`, the source of the run, and `base`, pruned and without LoRA."""

    def __init__(self, checkpoint: TrainingCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        model = self.config.model
        self.dense = open_for_pruning(locate_model(model), model)
        self.base = checkpoint.frozen_model(self.dense).weights
        self.shape = self.base.shape

    @property
    def exported(self) -> ExportedConfig:
        tower = self.dense.tower
        return export_config(self.dense.config, self.shape, self.config.model.dtype, tower and tower.config)

    def lora(self, layer: int) -> dict[str, Tensor]:
        """Reads a layer's fp32 masters: "{linear}.lora_A" (r, in_features), "{linear}.lora_B" (out_features, r)."""
        tensors = load_file(self.checkpoint.folder / layout.layer_file(layer))
        return {name.removesuffix(".master"): t for name, t in tensors.items() if name.endswith(".master")}


def open_newest(checkpoints: list[Path]) -> tuple[UnmergedModel, list[str]]:
    """Opens the first undamaged checkpoint. Also returns remarks about it and the damaged ones."""
    remarks: list[str] = []
    for path in checkpoints:
        try:
            unmerged = UnmergedModel(check_training_checkpoint(path))
        except UserError as error:
            remarks.append(f"{path.name} cannot be used: {error}")
            continue
        return unmerged, [*remarks, f"taken from {path.name}"]
    raise UserError(remarks[0])


def write_from_checkpoint(unmerged: UnmergedModel, folder: Path, *, merge: bool) -> None:
    """Writes the Hugging Face model that the run would export now, or its base. One layer is in memory at a time."""
    config, shape, state, tower = unmerged.config, unmerged.shape, unmerged.checkpoint.state, unmerged.dense.tower
    layers, dtype = range(len(shape.layers)), DTYPES[config.model.dtype]
    own, entries = weight_file_count(len(layers)), list[dict[str, int]]()
    count = own + (tower is not None)
    for k, layer in enumerate([*layers, None]):  # the last file has the parameters outside of layers
        names = [x.name for x in shape.outer] if layer is None else [name for name, _ in shape.layer_tensors(layer)]
        tensors = {name: unmerged.base.read_full(name, dtype) for name in names}
        if merge and layer is not None:
            lora, scaling = unmerged.lora(layer), config.lora.lora_alpha / config.lora.r
            for linear in shape.layers[layer].linears:
                name, (a, b) = f"{shape.prefix(layer)}{linear.name}", (f"{linear.linear}.lora_{x}" for x in "AB")
                tensors[name] = merge_lora(tensors[name], lora[a], lora[b], scaling, tensors[name].dtype)
        entries.append(write_weight_file(folder, k, count, in_files(tensors, shape, tower)))
    if tower:
        entries.append(copy_tensors(tower.files, folder, own, count))
    write_index(folder, entries)
    card = card_of_run(
        config,
        unmerged.dense.shape,
        shape,
        asked=state.asked,
        steps=state.step,
        perplexity_dense=state.totals.perplexity_dense,
        perplexity_pruned=state.totals.perplexity,
    )
    finish_folder(folder, unmerged.exported, unmerged.dense.folder, card)


def write_adapter(unmerged: UnmergedModel, folder: Path) -> None:
    """Writes the fp32 LoRA, at most the size of a decoder layer, into the one file that PEFT reads."""
    shape = unmerged.shape
    tensors = {
        name_in_file(shape, layer, name): tensor
        for layer in range(len(shape.layers))
        for name, tensor in as_in_peft(unmerged.lora(layer), shape.layers[layer].linears).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / ADAPTER_FILE, _adapter_config(unmerged.config.lora, shape))


def _adapter_config(lora: LoraConfig, shape: ModelShape) -> dict[str, object]:
    linears = list({linear.linear: linear for _, linear in shape.linears()}.values())
    stacks = [in_peft(x).tensor for x in linears if x.stack]
    # PEFT has no dropout on tensors without a module, and would take the modules of a dense MLP for experts.
    of_experts = {
        "target_modules": [x.linear for x in linears if x.runs and not x.stack],
        "target_parameters": [*stacks, *(x.name for x in linears if not x.runs)],
        "lora_dropout": 0.0,
    }
    return {
        "peft_type": "LORA",
        "task_type": task_type(shape),
        "base_model_name_or_path": f"../{BASE_FOLDER}",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": last_names(linear.linear for linear in linears),
        "bias": "none",
        "inference_mode": True,
        **(of_experts if stacks else {}),
    }
