"""Writes the weights of a run, a checkpoint or a model in one of the formats of `FORMATS`."""

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.checkpoint.load import TrainingCheckpoint, open_checkpoint
from loraprune_ds.errors import RunError, UserError, blame, one_line, require
from loraprune_ds.export.contents import FolderContents
from loraprune_ds.export.gguf_architecture import Precision, architecture_name
from loraprune_ds.export.huggingface import begin, copy_model, publish, write_model
from loraprune_ds.export.model_card import TEMPLATES, card_of_step, copy_model_card
from loraprune_ds.files import write_json
from loraprune_ds.model.adapters import task_type
from loraprune_ds.model.experts import as_in_peft
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import (
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    BASE_FOLDER,
    name_in_file,
    stock_targets,
)
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, check_room, write_weight_file
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.versions import check_installed


def one_rank() -> Communicator:
    """Returns this process as the only rank. It looks for no GPU."""
    return Communicator(device=torch.device("cpu"))


def open_newest(checkpoints: list[Path]) -> tuple[TrainingCheckpoint, list[str]]:
    """Opens the first undamaged checkpoint. Also returns remarks about it and the damaged ones."""
    remarks: list[str] = []
    for path in checkpoints:
        name = path.parent.name if path.name == PRUNING_FOLDER else path.name
        try:
            return open_checkpoint(path, one_rank()), [*remarks, f"taken from {name}"]
        except UserError as error:
            remarks.append(f"{name} cannot be used: {error}")
    raise UserError(remarks[0])


def write_adapter(checkpoint: TrainingCheckpoint, folder: Path) -> None:
    """Writes the fp32 LoRA, at most the size of a decoder layer, into the one file that PEFT reads."""
    shape = checkpoint.shape
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(shape.layers):
        for name, tensor in as_in_peft(checkpoint.lora(i), layer.linears).items():
            tensors[name_in_file(shape, i, name)] = tensor
    write_weight_file(folder / ADAPTER_WEIGHTS, tensors)
    lora = checkpoint.config.lora
    config = _adapter_config(lora.r, lora.lora_alpha, lora.lora_dropout, shape)
    write_json(folder / ADAPTER_FILE, config | _lora_patterns(checkpoint))


def _lora_patterns(checkpoint: TrainingCheckpoint) -> dict[str, dict[str, float]]:
    """Returns what PEFT needs of linears whose LoRA has another rank or scaling than most have."""
    lora = checkpoint.config.lora
    ranks = dict[str, float]()
    alphas = dict[str, float]()
    for i, layer in enumerate(checkpoint.shape.layers):
        factors = checkpoint.lora(i)
        for linear in layer.linears:
            name = f"{checkpoint.shape.prefix(i)}{linear.linear}"
            r = len(factors[f"{linear.linear}.lora_A"])
            alpha = checkpoint.scaling(i, linear.linear) * r
            if not linear.stack and r != lora.r:
                ranks[name] = r
            if not linear.stack and not math.isclose(alpha, lora.lora_alpha):
                alphas[name] = alpha
    patterns = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return {name: pattern for name, pattern in patterns.items() if pattern}


def _adapter_config(
    r: int, lora_alpha: float, lora_dropout: float, shape: ModelShape
) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": task_type(shape),
        "base_model_name_or_path": f"../{BASE_FOLDER}",
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "bias": "none",
        "inference_mode": True,
        **stock_targets(shape),
    }


def export(contents: FolderContents, name: str, out: Path) -> list[str]:
    """Writes format `name` of `FORMATS` into the new folder `out`, atomically. Returns remarks for the user."""
    require(
        bool(contents.model or contents.checkpoints),
        f"{contents.folder} has nothing to export: it {contents.summary}",
    )
    try:
        staging = begin(out)
        try:
            remarks = FORMATS[name](contents, staging)
            publish(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:  # also of a checkpoint that its run has just removed
        raise blame(error, f"{out} cannot be made: {one_line(error)}") from None
    except (SafetensorError, RunError) as error:
        raise RunError(f"{out} cannot be made: {one_line(error)}") from None
    return remarks


def _write_huggingface(contents: FolderContents, folder: Path) -> list[str]:
    if contents.model is None:
        checkpoint, remarks = open_newest(contents.checkpoints)
        numel = checkpoint.shape.total_numel()
        check_room(folder.parent, numel, checkpoint.config.model.dtype)
        write_model(checkpoint, folder, card_of_step(checkpoint), one_rank())
        return remarks
    copy_model(open_pretrained(contents.model), folder)
    return []


def _write_adapter(contents: FolderContents, folder: Path) -> list[str]:
    if not contents.checkpoints:
        formats = ", ".join(name for name in FORMATS if name != "adapter")
        raise UserError(
            f"{contents.folder} has no checkpoint with separate LoRA; possible formats: {formats}"
        )
    checkpoint, remarks = open_newest(contents.checkpoints)
    family = checkpoint.shape.family
    require(
        not family.lm_class(),
        f"{contents.folder}: AutoModelForCausalLM lacks the class of a {checkpoint.shape.model_type}, "
        "an adapter's base",
    )
    trained = ", ".join(checkpoint.state.trained)
    require(
        not trained,
        f"{contents.folder}: {trained} trained beside LoRA, which an adapter lacks; use --format hf",
    )
    # an adapter has the names of the text class
    checkpoint = replace(checkpoint, dense=replace(checkpoint.dense, tower=None))
    base = folder / BASE_FOLDER
    base.mkdir()
    write_model(checkpoint, base, card_of_step(checkpoint), one_rank(), merge=False)
    copy_model_card(base, base, "This base has no LoRA in it: see the folder above.\n")
    adapter = folder / ADAPTER_FOLDER
    adapter.mkdir()
    write_adapter(checkpoint, adapter)
    # A finished run has a fuller model card than its checkpoint.
    how_to_load = TEMPLATES.get_template("load_adapter.txt").render(exported=checkpoint.exported)
    copy_model_card(contents.model or base, folder, how_to_load)
    return remarks


def _write_gguf(contents: FolderContents, folder: Path, *, precision: Precision) -> list[str]:
    check_installed("gguf", "an export to GGUF")
    # now that it is there
    from loraprune_ds.export.gguf import write_gguf

    name = contents.folder.resolve().name
    scratch = folder / ".merged"
    model = contents.model
    remarks: list[str] = []
    if model is None:
        model = scratch
        scratch.mkdir()
        remarks = _write_huggingface(contents, scratch)
    pretrained = open_pretrained(model)
    path = folder / f"{name}-{precision}.gguf"
    try:
        remarks += write_gguf(pretrained, path, precision, name)
    except UserError as error:
        raise UserError(str(error).replace(str(scratch), str(contents.folder))) from None
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


FORMATS: dict[str, Callable[[FolderContents, Path], list[str]]] = {
    "hf": _write_huggingface,
    "adapter": _write_adapter,
    "gguf-f16": partial(_write_gguf, precision="f16"),
    "gguf-q8_0": partial(_write_gguf, precision="q8_0"),
}
