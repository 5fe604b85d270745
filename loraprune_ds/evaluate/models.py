"""What a user names as a model: a checkpoint, a hub id, a PEFT adapter or the folder of a run."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel

from loraprune_ds.checkpoint.run_folder import MODEL_FOLDER, REPORT_FILE, Status, read_status
from loraprune_ds.config import DTYPES, ModelConfig
from loraprune_ds.errors import UserError, one_line
from loraprune_ds.evaluate.runs import read_run_report
from loraprune_ds.files import read_json
from loraprune_ds.model.adapters import ADAPTER_FOLDER
from loraprune_ds.model.build import locate_model
from loraprune_ds.model.families import CAUSAL_LMS
from loraprune_ds.model.pretrained import PretrainedModel, open_pretrained

Kind = Literal["checkpoint", "adapter", "run"]
ADAPTER_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """A model that was found and whose files fit together; no weight is read yet.

    Attributes:
        path: as the user named it.
        checkpoint: the weights, of an adapter's base without the adapter.
        tokenizer_folder: where its tokenizer is.
        adapter: folder of the LoRA to merge.
        dense_parameters: of the model a run began with; None if it was no run.
        method: a run's criterion and ranking.
    """

    path: str
    kind: Kind
    pretrained: PretrainedModel
    tokenizer_folder: Path
    adapter: Path | None = None
    dense_parameters: int | None = None
    method: str | None = None

    @property
    def dtype(self) -> str:
        """The dtype its config.json declares; float32 if none."""
        config = self.pretrained.config
        return config.get("dtype") or config.get("torch_dtype") or "float32"


def find_model(path: str) -> Source:
    """Looks at what `path` names: a folder, `embedded` or a hub id, which is downloaded.

    Raises:
        UserError: there is nothing, or nothing that can be evaluated; one line naming the file at fault.
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
        for adapter in (folder, folder / ADAPTER_FOLDER):  # the second: what launch/export.py --format adapter made
            if (adapter / ADAPTER_FILE).is_file():
                return _find_adapter(path, adapter)
    return Source(path, "checkpoint", open_pretrained(folder), folder)


def _find_run(path: str, folder: Path, status: Status) -> Source:
    """The exported model of a finished run."""
    if status.state != "finished":
        raise UserError(f"{path} holds an unfinished run ({status}), which has no {MODEL_FOLDER}/ to evaluate yet")
    report, model = folder / REPORT_FILE, folder / MODEL_FOLDER
    try:
        dense, method = read_run_report(read_json(report))
    except (KeyError, TypeError) as error:
        raise UserError(f"{report} is damaged: {error!r}") from None
    return Source(path, "run", open_pretrained(model), model, dense_parameters=dense, method=method)


def _find_adapter(path: str, folder: Path) -> Source:
    """A LoRA adapter and its base model, which is looked for beside the adapter first, then as named."""
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
        source = find_model(str(beside) if beside.is_dir() else base)
    except UserError as error:
        raise UserError(f"base model of adapter {path}: {error}") from None
    if source.adapter:
        raise UserError(f"base model of adapter {path}: {base} is an adapter itself")
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return replace(
        source, path=path, kind="adapter", adapter=folder, tokenizer_folder=folder if own else source.tokenizer_folder
    )


def choose_dtype(source: Source, dtype: str | None) -> str:
    """`dtype`, or the model's own where the user named none.

    Raises:
        UserError: the model's own is none to compute in.
    """
    chosen = dtype or source.dtype
    if chosen not in DTYPES:
        raise UserError(f"{source.path} is stored as {chosen}; choose --dtype {', '.join(DTYPES)}")
    return chosen


def load_model(source: Source, dtype: str, device: torch.device) -> PreTrainedModel:
    """The whole model on this rank's device, in evaluation mode; an adapter is merged in fp32 and rounded once.

    Raises:
        UserError: the adapter does not fit its base model.
    """
    model_class = CAUSAL_LMS[source.pretrained.shape.model_type]
    read_dtype = torch.float32 if source.adapter else getattr(torch, dtype)
    model = model_class.from_pretrained(source.pretrained.folder, dtype=read_dtype, attn_implementation="sdpa")
    if source.adapter:
        model = _merge(model, source.adapter)
        for parameter in model.parameters():  # not model.to(), which would round the rotary frequencies too
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # a decorator hides the type of `to`


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, RuntimeError, ValueError, TypeError, UserWarning) as error:
        raise UserError(f"adapter {adapter} does not fit its base model: {one_line(error)[:200]}") from None
    return wrapped.merge_and_unload()
