"""One result in any of the formats it can be had in: finds what a folder holds and converts it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

from loraprune_ds.checkpoint.layout import numbered, step_folder
from loraprune_ds.checkpoint.load import check_training_checkpoint
from loraprune_ds.checkpoint.run_folder import CHECKPOINTS_FOLDER, MODEL_FOLDER, Status, read_status
from loraprune_ds.checkpoint.state import STATE_FILE
from loraprune_ds.errors import UserError, one_line
from loraprune_ds.export.from_checkpoint import Unmerged, write_base_and_adapter, write_merged
from loraprune_ds.export.gguf import Precision, write_gguf
from loraprune_ds.export.huggingface import begin, publish
from loraprune_ds.export.model_card import retell_model_card
from loraprune_ds.model.adapters import BASE_FOLDER
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.units import format_bytes

HOW_TO_LOAD_ADAPTER = """The pruned base is in `base/`, the LoRA that was tuned on it in `adapter/`, for further tuning.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
base = AutoModelForCausalLM.from_pretrained(f"{{folder}}/base", dtype="auto"{trust})
model = PeftModel.from_pretrained(base, f"{{folder}}/adapter", is_trainable=True)
tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/base"{trust})
```
"""
HOW_TO_LOAD_GGUF = """`{file}` is the {dtype} model as {precision}, for llama.cpp (architecture `{arch}`).

```python
from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama("path/to/{file}")
print(model("The import statement", max_tokens=32, temperature=0)["choices"][0]["text"])
```
"""


class NoRoom(UserError):
    """What is to be written does not fit where it is to lie."""


@dataclass(frozen=True)
class Source:
    """What was found.

    Attributes:
        name: of the result, for file names.
        model: folder of the merged model, if there is one.
        checkpoints: with LoRA not merged, newest first; of the same weights as `model` if there is one.
    """

    name: str
    model: Path | None
    checkpoints: list[Path]


def find_source(path: Path) -> Source:
    """Looks at the folder of a run, one of its checkpoints, or a merged model.

    Raises:
        UserError: it is none of these, or a run that has nothing to export yet.
    """
    name = path.resolve().name
    if status := read_status(path):
        return _find_run(path, name, status)
    if (path / STATE_FILE).is_file():
        return Source(name, None, [path])
    if (path / "config.json").is_file():
        return Source(name, path, [])
    what = "holds no run, checkpoint or model" if path.is_dir() else "is no folder"
    raise UserError(f"{path} {what}")


def _find_run(path: Path, name: str, status: Status) -> Source:
    steps = sorted(numbered(path / CHECKPOINTS_FOLDER, "step"), reverse=True)
    checkpoints = [step_folder(path / CHECKPOINTS_FOLDER, step) for step in steps]
    if status.state == "finished":
        return Source(name, path / MODEL_FOLDER, checkpoints[:1] if steps[:1] == [status.step] else [])
    if not checkpoints:
        raise UserError(f"{path} holds an unfinished run ({status}) without a checkpoint: nothing to export yet")
    return Source(name, None, checkpoints)


def export(source: Source, name: str, out: Path) -> list[str]:
    """Writes format `name` of `FORMATS` into the new folder `out`, which appears whole or not at all.

    Returns:
        Lines that a person should know about the result.

    Raises:
        UserError: `out` is there already or cannot be written, or this result cannot be had in this format: says in
            which it can.
    """
    try:
        staging = begin(out)
        try:
            remarks = FORMATS[name](source, staging)
            publish(out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # a full disk, or a checkpoint that its run has dropped meanwhile
        raise UserError(f"{out} cannot be made: {one_line(error)}") from None
    return remarks


def _huggingface(source: Source, folder: Path) -> list[str]:
    if source.model is None:
        unmerged, remarks = _open_newest(source.checkpoints)
        _check_room(unmerged, folder)
        write_merged(unmerged, folder)
        return remarks
    open_pretrained(source.model)
    shutil.copytree(source.model, folder, dirs_exist_ok=True)
    return []


def _adapter(source: Source, folder: Path) -> list[str]:
    if not source.checkpoints:
        others = ", ".join(name for name in FORMATS if name != "adapter")
        raise UserError(f"{source.name} has no checkpoint with its LoRA apart; formats that can: {others}")
    unmerged, remarks = _open_newest(source.checkpoints)
    write_base_and_adapter(unmerged, folder)
    trust = ", trust_remote_code=True" if unmerged.exported.trust_remote_code else ""
    # A finished run knows more about its result than its checkpoint.
    retell_model_card(source.model or folder / BASE_FOLDER, folder, HOW_TO_LOAD_ADAPTER.format(trust=trust))
    return remarks


def _open_newest(checkpoints: list[Path]) -> tuple[Unmerged, list[str]]:
    """The first that is whole, and a line about what was passed over."""
    remarks: list[str] = []
    for path in checkpoints:
        try:
            unmerged = Unmerged(check_training_checkpoint(path))
        except UserError as error:
            remarks.append(f"{path.name} cannot be used: {error}")
            continue
        return unmerged, [*remarks, f"taken from {path.name}"]
    raise UserError(remarks[0])


def _check_room(unmerged: Unmerged, folder: Path) -> None:
    needed = unmerged.shape.total_numel() * getattr(torch, unmerged.config.model.dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoom(
            f"the merged model needs {format_bytes(needed)} in {folder.parent}, where {format_bytes(free)} are free"
        )


def _gguf(precision: Precision) -> Callable[[Source, Path], list[str]]:
    def write(source: Source, folder: Path) -> list[str]:
        merged, model = folder / ".merged", source.model
        remarks: list[str] = []
        if model is None:
            merged.mkdir()
            remarks = _huggingface(source, merged)
            model = merged
        pretrained = open_pretrained(model)
        path = folder / f"{source.name}-{precision}.gguf"
        remarks += write_gguf(pretrained, path, precision, source.name)
        dtype, arch = pretrained.config.get("dtype"), "llama" if pretrained.shape.is_uniform else "deci"
        how_to_load = HOW_TO_LOAD_GGUF.format(file=path.name, dtype=dtype, precision=precision, arch=arch)
        retell_model_card(model, folder, how_to_load + "".join(f"\n{remark}\n" for remark in remarks))
        shutil.rmtree(merged, ignore_errors=True)
        return remarks

    return write


FORMATS: dict[str, Callable[[Source, Path], list[str]]] = {
    "hf": _huggingface,
    "adapter": _adapter,
    "gguf-f16": _gguf("f16"),
    "gguf-q8_0": _gguf("q8_0"),
}
