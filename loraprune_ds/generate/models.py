"""Models by the name a user gives: a folder, a hub id, a PEFT adapter or a run. And what they write."""

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerBase

from loraprune_ds.config import ModelConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.export.contents import find_contents
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.model.classes import attn_implementation, causal_lm_class, config_object
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.pretrained.adapters import ADAPTER_FILE
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_pretrained
from loraprune_ds.pretrained.sources import locate_model
from loraprune_ds.pretrained.text_part import in_files
from loraprune_ds.pretrained.tokenizer import has_tokenizer, load_tokenizer
from loraprune_ds.report import records
from loraprune_ds.report.measured import read_measured

Ids = list[int]


@dataclass(frozen=True)
class PruningResult:
    """A pruned model on disk, with the report of the run that made it. `open_result` makes it."""

    pretrained: PretrainedModel = field(repr=False)
    # report.json. None for an export without its run
    report: JsonObject | None = field(repr=False)
    run: Path  # the folder of the run, or of the export without one

    @property
    def folder(self) -> Path:
        return self.pretrained.folder

    @property
    def kept_groups(self) -> list[JsonObject] | None:
        """The layers of kept_groups.json. None for an export without its run."""
        return read_json(self.run / records.KEPT_GROUPS_FILE, missing_ok=True).get("layers")

    def load_model(self, **options: Any) -> PreTrainedModel:
        """Loads the model with its tower, with `options` for `from_pretrained`. No code in its folder runs."""
        model_class: Any = AutoModelForImageTextToText
        if self.pretrained.tower is None:
            model_class = causal_lm_class(self.pretrained.shape.model_type)
        return model_class.from_pretrained(self.folder, **options)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)


def open_result(folder: str | Path) -> PruningResult:
    """Opens the folder of a finished run, or of a model that it has exported.

    Raises:
        UserError: the folder holds neither, or a file is missing or damaged. The message names the file.
    """
    contents = find_contents(Path(folder).expanduser())
    pretrained = open_pretrained(contents.model_folder())
    return PruningResult(pretrained, contents.read_report(), contents.results or contents.folder)


@dataclass(frozen=True)
class ModelSource:
    """A model whose files exist and fit together. No weight is read yet."""

    path: str  # as the user named it
    kind: Literal["checkpoint", "adapter", "run"]
    pretrained: PretrainedModel  # of an adapter, its base model
    tokenizer_folder: Path
    adapter: Path | None = None  # folder of the LoRA to merge
    method: str | None = None  # criterion and ranking of a run


def find_model(path: str) -> ModelSource:
    """Finds the model named `path`: a folder, `embedded` or a hub id, which is downloaded."""
    require(not Path(path).is_file(), f"{path} is a file; a model is a folder or a hub id")
    contents = find_contents(locate_model(ModelConfig(path), key=""))
    if contents.adapter:
        return _find_adapter(path, contents.adapter)
    folder = contents.model_folder()
    source = ModelSource(path, "checkpoint", open_pretrained(folder), folder)
    report = contents.read_report()
    if report is None:
        return source
    measured = read_measured(report, Path(path, records.REPORT_FILE))
    return replace(source, kind="run", method=measured.method)


def _find_adapter(path: str, folder: Path) -> ModelSource:
    """Finds a LoRA adapter and its base model, in a folder relative to the adapter or by name."""
    config = read_json(folder / ADAPTER_FILE)
    base = config.get("base_model_name_or_path")
    kind = config.get("peft_type")
    require(
        kind == "LORA", f"{folder / ADAPTER_FILE}: only LoRA can be merged; peft_type is {kind!r}"
    )
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTER_FILE} names no base_model_name_or_path")
    require(
        (folder / "adapter_model.safetensors").is_file(),
        f"{folder / 'adapter_model.safetensors'} does not exist",
    )
    relative = folder / base
    try:
        base_model = find_model(str(relative) if relative.is_dir() else base)
    except UserError as error:
        raise UserError(f"base model of adapter {path}: {error}") from None
    require(not base_model.adapter, f"base model of adapter {path}: {base} is an adapter itself")
    tokenizer_folder = folder if has_tokenizer(folder) else base_model.tokenizer_folder
    return replace(
        base_model, path=path, kind="adapter", adapter=folder, tokenizer_folder=tokenizer_folder
    )


def load_model(source: ModelSource, dtype: str, device: torch.device) -> PreTrainedModel:
    """Loads the model on `device` for evaluation, without a tower. An adapter is merged in fp32 and rounded once."""
    pretrained = source.pretrained
    weights = pretrained.weights
    read_dtype = torch.float32 if source.adapter else DTYPES[dtype]
    folder = pretrained.folder
    options: dict[str, Any] = {}
    if pretrained.tower:
        options["config"] = config_object(pretrained.config)
        options["key_mapping"] = pretrained.tower.key_mapping
    if weights.transposed:  # the text class does not read these
        tensors = {name: weights.read_full(name, read_dtype) for name in weights.shape.parameters()}
        folder = None
        options["state_dict"] = in_files(tensors, weights.shape, None)
        options["key_mapping"] = None
    model = causal_lm_class(pretrained.shape.model_type).from_pretrained(
        folder,
        dtype=read_dtype,
        attn_implementation=attn_implementation("sdpa", pretrained.shape.family),
        **options,
    )
    if source.adapter:
        model = _merge(model, source.adapter)
        for parameter in model.parameters():  # model.to() would round the rotary frequencies, too
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model.to(device).eval()  # pyright: ignore[reportArgumentType]  # a decorator hides the type of `to`


def _merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter))
    except (SafetensorError, RuntimeError, ValueError, TypeError, UserWarning) as error:
        raise UserError(
            f"adapter {adapter} does not fit its base model: {one_line(error)[:200]}"
        ) from None
    return wrapped.merge_and_unload()


def choose_dtype(source: ModelSource, dtype: str | None) -> Dtype:
    """Returns `dtype`, or the one that the model's config.json declares, or float32."""
    config = source.pretrained.config
    chosen = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    require(
        chosen in DTYPES, f"{source.path} is stored as {chosen}; choose --dtype {', '.join(DTYPES)}"
    )
    return cast(Dtype, chosen)
