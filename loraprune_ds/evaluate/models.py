"""Models by the name a user gives: a Hugging Face folder, a hub id, a PEFT adapter or the folder of a run."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from loraprune_ds.checkpoint.run_folder import MODEL_FOLDER, REPORT_FILE, Status, describe_method, read_status
from loraprune_ds.config import Dtype, ModelConfig
from loraprune_ds.errors import UserError, one_line
from loraprune_ds.files import read_json
from loraprune_ds.model.adapters import ADAPTER_FILE, ADAPTER_FOLDER
from loraprune_ds.model.classes import attn_implementation, causal_lm_class
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.pretrained import PretrainedModel, open_pretrained


@dataclass(frozen=True)
class FoundModel:
    """Describes a model whose files are there and fit together. No weight is read yet.

    Attributes:
        path: as the user named it.
        pretrained: the weights. For an adapter, those of its base model.
        adapter: folder of the LoRA to merge.
        dense_parameters: of the model that a run began with. None if this is no run.
        method: criterion and ranking of a run.
    """

    path: str
    kind: Literal["checkpoint", "adapter", "run"]
    pretrained: PretrainedModel
    tokenizer_folder: Path
    adapter: Path | None = None
    dense_parameters: int | None = None
    method: str | None = None

    @property
    def dtype(self) -> str:
        """Returns the dtype that its config.json declares, or float32."""
        config = self.pretrained.config
        return config.get("dtype") or config.get("torch_dtype") or "float32"


def find_model(path: str) -> FoundModel:
    """Finds what `path` names: a folder, `embedded` or a hub id, which is downloaded.

    Raises:
        UserError: there is nothing that can be evaluated. One line names the file at fault.
    """
    if Path(path).is_file():
        raise UserError(f"{path} is a file; a model is a folder or a hub id")
    try:
        folder = locate_model(ModelConfig(path))
    except UserError as error:
        raise UserError(str(error).removeprefix("model.path: ")) from None
    if status := read_status(folder):
        return _find_run(path, folder, status)
    if not (folder / "config.json").is_file():
        for adapter in (folder, folder / ADAPTER_FOLDER):  # the second is made by launch/export.py --format adapter
            if (adapter / ADAPTER_FILE).is_file():
                return _find_adapter(path, adapter)
    return FoundModel(path, "checkpoint", open_pretrained(folder), folder)


def _find_run(path: str, folder: Path, status: Status) -> FoundModel:
    """Finds the export of a finished run."""
    if status.state != "finished":
        raise UserError(f"{path} holds an unfinished run ({status}), which has no {MODEL_FOLDER}/ to evaluate yet")
    report_path, model = folder / REPORT_FILE, folder / MODEL_FOLDER
    report = read_json(report_path)
    try:
        dense, method = int(report["params"]["dense"]), describe_method(report)
    except (KeyError, TypeError) as error:
        raise UserError(f"{report_path} is damaged: {error!r}") from None
    return FoundModel(path, "run", open_pretrained(model), model, dense_parameters=dense, method=method)


def _find_adapter(path: str, folder: Path) -> FoundModel:
    """Finds a LoRA adapter and its base model, first beside the adapter, then by its name."""
    config = read_json(folder / ADAPTER_FILE)
    base = config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder / ADAPTER_FILE}: only LoRA can be merged; peft_type is {config.get('peft_type')!r}")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTER_FILE} names no base_model_name_or_path")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder / 'adapter_model.safetensors'} does not exist")
    beside = folder / base
    try:
        found = find_model(str(beside) if beside.is_dir() else base)
    except UserError as error:
        raise UserError(f"base model of adapter {path}: {error}") from None
    if found.adapter:
        raise UserError(f"base model of adapter {path}: {base} is an adapter itself")
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer_folder = folder if has_tokenizer else found.tokenizer_folder
    return replace(found, path=path, kind="adapter", adapter=folder, tokenizer_folder=tokenizer_folder)


def choose_dtype(found: FoundModel, dtype: str | None) -> Dtype:
    """Returns `dtype`, or the model's own where the user named none.

    Raises:
        UserError: nothing is computed in the model's own dtype.
    """
    chosen = dtype or found.dtype
    if chosen not in DTYPES:
        raise UserError(f"{found.path} is stored as {chosen}; choose --dtype {', '.join(DTYPES)}")
    return cast(Dtype, chosen)


def load_model(found: FoundModel, dtype: str, device: torch.device) -> PreTrainedModel:
    """Loads the whole model on `device`, in evaluation mode. An adapter is merged in fp32 and rounded once.

    Raises:
        UserError: the adapter does not fit its base model.
    """
    model_class = causal_lm_class(found.pretrained.shape.model_type)
    read_dtype = torch.float32 if found.adapter else DTYPES[dtype]
    attention = attn_implementation("sdpa", found.pretrained.shape.family)
    model = model_class.from_pretrained(found.pretrained.folder, dtype=read_dtype, attn_implementation=attention)
    if found.adapter:
        model = _merge(model, found.adapter)
        for parameter in model.parameters():  # model.to() would round the rotary frequencies, too
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # a decorator hides the type of `to`


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, RuntimeError, ValueError, TypeError, UserWarning) as error:
        raise UserError(f"adapter {adapter} does not fit its base model: {one_line(error)[:200]}") from None
    return wrapped.merge_and_unload()
