"""Finds the weights of a run, a checkpoint or a model, and writes them in one of the formats of `FORMATS`."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.checkpoint import layout
from loraprune_ds.checkpoint.load import TrainingCheckpoint, open_checkpoint
from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import RunError, UserError, blame, one_line, require
from loraprune_ds.export.gguf import write_gguf
from loraprune_ds.export.gguf_architecture import architecture_name
from loraprune_ds.export.gguf_tensors import Precision
from loraprune_ds.export.huggingface import begin, copy_model, publish, write_model
from loraprune_ds.export.model_card import TEMPLATES, card_of_step, copy_model_card
from loraprune_ds.export.mtp import add_mtp, cut_mtp
from loraprune_ds.files import write_json
from loraprune_ds.model.adapters import last_names, task_type
from loraprune_ds.model.experts import as_in_peft
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import ADAPTER_FILE, ADAPTER_FOLDER, BASE_FOLDER, name_in_file
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.text_part import MTP
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, read_headers, write_weight_file
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report import records
from loraprune_ds.units import format_bytes


@dataclass(frozen=True)
class ExportSource:
    """The folders to export from. With `model` the checkpoints, newest first, have its weights."""

    name: str  # for file names
    model: Path | None
    checkpoints: list[Path]
    # a dense model, to keep its layers that predict further tokens (`cut_mtp`)
    mtp: Path | None = None


def find_source(path: Path) -> ExportSource:
    """Finds the source in the folder of a run, of one of its checkpoints, or of a merged model."""
    name = path.resolve().name
    status = layout.read_status(path)
    if status:
        root = path / layout.CHECKPOINTS_FOLDER
        steps = layout.numbered(root, "step")[::-1]
        checkpoints = [layout.step_folder(root, step) for step in steps]
        if status.state == "finished":
            of_model = checkpoints[:1] if steps[:1] == [status.step] else []
            return ExportSource(name, path / records.MODEL_FOLDER, of_model)
        require(
            bool(checkpoints),
            f"{path} holds an unfinished run ({status}) without a checkpoint: nothing to export yet",
        )
        return ExportSource(name, None, checkpoints)
    if (path / layout.STATE_FILE).is_file():
        return ExportSource(name, None, [path])
    if (path / "config.json").is_file():
        return ExportSource(name, path, [])
    fault = "holds no run, checkpoint or model" if path.is_dir() else "is no folder"
    raise UserError(f"{path} {fault}")


def one_rank() -> Communicator:
    """Returns this process as the only rank. It looks for no GPU."""
    return Communicator(device=torch.device("cpu"))


def open_newest(checkpoints: list[Path]) -> tuple[TrainingCheckpoint, list[str]]:
    """Opens the first undamaged checkpoint. Also returns remarks about it and the damaged ones."""
    remarks: list[str] = []
    for path in checkpoints:
        try:
            return open_checkpoint(path, one_rank()), [*remarks, f"taken from {path.name}"]
        except UserError as error:
            remarks.append(f"{path.name} cannot be used: {error}")
    raise UserError(remarks[0])


def write_adapter(step: TrainingCheckpoint, folder: Path) -> None:
    """Writes the fp32 LoRA, at most the size of a decoder layer, into the one file that PEFT reads."""
    shape = step.shape
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(shape.layers):
        for name, tensor in as_in_peft(step.lora(i), layer.linears).items():
            tensors[name_in_file(shape, i, name)] = tensor
    write_weight_file(folder / ADAPTER_WEIGHTS, tensors)
    write_json(folder / ADAPTER_FILE, _adapter_config(step.config.lora, shape))


def _adapter_config(lora: LoraConfig, shape: ModelShape) -> dict[str, object]:
    linears = list({linear.linear: linear for _, linear in shape.linears()}.values())
    config: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": task_type(shape),
        "base_model_name_or_path": f"../{BASE_FOLDER}",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": last_names(linear.linear for linear in linears),
        "bias": "none",
        "inference_mode": True,
    }
    stacks = [linear.stock_name for linear in linears if linear.stack]
    if stacks:
        # PEFT has no dropout on tensors without a module, and would take the modules of a dense MLP for experts.
        config["target_modules"] = [x.linear for x in linears if x.spans and not x.stack]
        config["target_parameters"] = [*stacks, *(x.name for x in linears if not x.spans)]
        config["lora_dropout"] = 0.0
    return config


def export(source: ExportSource, name: str, out: Path) -> list[str]:
    """Writes format `name` of `FORMATS` into the new folder `out`, atomically. Returns remarks for the user."""
    require(name == "hf" or source.mtp is None, "--mtp needs --format hf")
    try:
        staging = begin(out)
        try:
            remarks = FORMATS[name](source, staging)
            publish(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:  # also of a checkpoint that its run has just removed
        raise blame(error, f"{out} cannot be made: {one_line(error)}") from None
    except (SafetensorError, RunError) as error:
        raise RunError(f"{out} cannot be made: {one_line(error)}") from None
    return remarks


def _write_huggingface(source: ExportSource, folder: Path) -> list[str]:
    if source.model is None:
        step, remarks = open_newest(source.checkpoints)
        shape = step.shape
        mtp = cut_mtp(source.mtp, shape) if source.mtp else None
        needed = shape.total_numel() * DTYPES[step.config.model.dtype].itemsize
        free = shutil.disk_usage(folder).free
        require(
            needed <= free,
            f"the merged model needs {format_bytes(needed)} in {folder.parent}, "
            f"where {format_bytes(free)} are free",
        )
        write_model(step, folder, card_of_step(step), one_rank())
    else:
        remarks = []
        pretrained = open_pretrained(source.model)
        mtp = None
        if source.mtp:
            require(
                not any(name.startswith(MTP) for name in read_headers(source.model)),
                f"{source.model} has layers that predict further tokens ({MTP}*) already",
            )
            mtp = cut_mtp(source.mtp, pretrained.shape)
        copy_model(pretrained, folder)
    return [*remarks, add_mtp(mtp, folder)] if mtp else remarks


def _write_adapter(source: ExportSource, folder: Path) -> list[str]:
    if not source.checkpoints:
        formats = ", ".join(name for name in FORMATS if name != "adapter")
        raise UserError(
            f"{source.name} has no checkpoint with separate LoRA; possible formats: {formats}"
        )
    step, remarks = open_newest(source.checkpoints)
    require(
        not step.shape.family.lm_class(),
        f"{source.name}: AutoModelForCausalLM lacks the class of a {step.shape.model_type}, an adapter's base",
    )
    # an adapter has the names of the text class
    step = replace(step, dense=replace(step.dense, tower=None))
    base = folder / BASE_FOLDER
    base.mkdir()
    write_model(step, base, card_of_step(step), one_rank(), merge=False)
    copy_model_card(base, base, "This base has no LoRA in it: see the folder above.\n")
    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir()
    write_adapter(step, adapter)
    # A finished run has a fuller model card than its checkpoint.
    how_to_load = TEMPLATES.get_template("load_adapter.txt").render(exported=step.exported)
    copy_model_card(source.model or base, folder, how_to_load)
    return remarks


def _write_gguf(source: ExportSource, folder: Path, *, precision: Precision) -> list[str]:
    scratch = folder / ".merged"
    model = source.model
    remarks: list[str] = []
    if model is None:
        model = scratch
        scratch.mkdir()
        remarks = _write_huggingface(source, scratch)
    pretrained = open_pretrained(model)
    path = folder / f"{source.name}-{precision}.gguf"
    remarks += write_gguf(pretrained, path, precision, source.name)
    if pretrained.tower is not None:
        remarks.append("the file reads text alone, because a GGUF file has no tower")
    how_to_load = TEMPLATES.get_template("load_gguf.txt").render(
        file=path.name,
        precision=precision,
        arch=architecture_name(pretrained.config, pretrained.shape),
        pretrained=pretrained,
        remarks=remarks,
    )
    copy_model_card(model, folder, how_to_load)
    shutil.rmtree(scratch, ignore_errors=True)
    return remarks


FORMATS: dict[str, Callable[[ExportSource, Path], list[str]]] = {
    "hf": _write_huggingface,
    "adapter": _write_adapter,
    "gguf-f16": partial(_write_gguf, precision="f16"),
    "gguf-q8_0": partial(_write_gguf, precision="q8_0"),
}
