"""Finds the weights to export, and writes LoRA as PEFT's adapter."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.load import Step, open_step
from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError
from loraprune_ds.files import write_json
from loraprune_ds.model.adapters import ADAPTER_FILE, BASE_FOLDER, last_names, name_in_file, task_type
from loraprune_ds.model.experts import as_in_peft, in_peft
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.report import records


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
            model = path / records.MODEL_FOLDER
            return ExportSource(name, model, checkpoints[:1] if steps[:1] == [status.step] else [])
        if not checkpoints:
            raise UserError(f"{path} holds an unfinished run ({status}) without a checkpoint: nothing to export yet")
        return ExportSource(name, None, checkpoints)
    if (path / layout.STATE_FILE).is_file():
        return ExportSource(name, None, [path])
    if (path / "config.json").is_file():
        return ExportSource(name, path, [])
    raise UserError(f"{path} {'holds no run, checkpoint or model' if path.is_dir() else 'is no folder'}")


def open_newest(checkpoints: list[Path]) -> tuple[Step, list[str]]:
    """Opens the first undamaged checkpoint. Also returns remarks about it and the damaged ones."""
    remarks: list[str] = []
    for path in checkpoints:
        try:
            step = open_step(path)
        except UserError as error:
            remarks.append(f"{path.name} cannot be used: {error}")
            continue
        return step, [*remarks, f"taken from {path.name}"]
    raise UserError(remarks[0])


def write_adapter(step: Step, folder: Path) -> None:
    """Writes the fp32 LoRA, at most the size of a decoder layer, into the one file that PEFT reads."""
    shape = step.shape
    tensors = {
        name_in_file(shape, layer, name): tensor
        for layer in range(len(shape.layers))
        for name, tensor in as_in_peft(step.checkpoint.lora(layer), shape.layers[layer].linears).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(folder / ADAPTER_FILE, _adapter_config(step.checkpoint.config.lora, shape))


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
