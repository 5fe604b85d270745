"""Models by the name a user gives: a Hugging Face folder, a hub id, a PEFT adapter or the folder of a run."""

import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NoReturn, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraprune_ds.checkpoint.layout import (
    MODEL_FOLDER,
    REPORT_FILE,
    STATE_FILE,
    STATUS_FILE,
    Status,
    describe_method,
    read_status,
)
from loraprune_ds.config import Dtype, ModelConfig
from loraprune_ds.errors import RunError, UserError, one_line, require
from loraprune_ds.evaluate.perplexity import Batch, make_batches
from loraprune_ds.evaluate.settings import EvaluationSettings, ServeSettings
from loraprune_ds.evaluate.speed import Served, ServedModel, measure_serving
from loraprune_ds.evaluate.zeroshot import check_tasks
from loraprune_ds.export.formats import NoRoom, export
from loraprune_ds.export.huggingface import copy_model, has_tokenizer
from loraprune_ds.export.lora import find_source
from loraprune_ds.files import read_json
from loraprune_ds.model.adapters import ADAPTER_FILE, ADAPTER_FOLDER
from loraprune_ds.model.classes import attn_implementation, causal_lm_class
from loraprune_ds.model.family import PRUNED
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.pretrained import PretrainedModel, open_pretrained
from loraprune_ds.model.tokenizer import load_tokenizer, window_start
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import check_dtype


@dataclass(frozen=True)
class FoundModel:
    """A model whose files exist and fit together. No weight is read yet."""

    path: str  # as the user named it
    kind: Literal["checkpoint", "adapter", "run"]
    pretrained: PretrainedModel  # of an adapter, its base model
    tokenizer_folder: Path
    adapter: Path | None = None  # folder of the LoRA to merge
    dense_parameters: int | None = None  # of the model that a run began with
    method: str | None = None  # criterion and ranking of a run


@dataclass(frozen=True)
class PreparedModel:
    """A model with the input of its measurements."""

    found: FoundModel
    dtype: Dtype
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batch]


def find_model(path: str) -> FoundModel:
    """Finds the model named `path`: a folder, `embedded` or a hub id, which is downloaded.

    Raises:
        UserError: there is nothing that can be evaluated. The line names the file at fault.
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
    """Finds a LoRA adapter and its base model: in a folder relative to the adapter, or by its name."""
    config = read_json(folder / ADAPTER_FILE)
    base = config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder / ADAPTER_FILE}: only LoRA can be merged; peft_type is {config.get('peft_type')!r}")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder / ADAPTER_FILE} names no base_model_name_or_path")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder / 'adapter_model.safetensors'} does not exist")
    relative = folder / base
    try:
        found = find_model(str(relative) if relative.is_dir() else base)
    except UserError as error:
        raise UserError(f"base model of adapter {path}: {error}") from None
    if found.adapter:
        raise UserError(f"base model of adapter {path}: {base} is an adapter itself")
    tokenizer_folder = folder if has_tokenizer(folder) else found.tokenizer_folder
    return replace(found, path=path, kind="adapter", adapter=folder, tokenizer_folder=tokenizer_folder)


def prepare_models(paths: list[str], settings: EvaluationSettings) -> list[PreparedModel]:
    """Finds all models, checks the settings against them, and tokenises the text for each."""
    if settings.tasks:
        check_tasks(settings.tasks)
    models = [_prepare(path, settings) for path in paths]
    for other in models[1:]:
        pairs = zip_longest(models[0].batches, other.batches)
        if not all(a and b and torch.equal(a.input_ids, b.input_ids) for a, b in pairs):
            both = f"{paths[0]} and {other.found.path}"
            raise UserError(f"{both} read the text as different tokens: their perplexities do not compare")
    return models


def _prepare(path: str, settings: EvaluationSettings) -> PreparedModel:
    found = find_model(path)
    dtype = choose_dtype(found, settings.dtype)
    if settings.sharded:
        check_dtype(dtype)
        if found.adapter:
            raise UserError(f"{path}: --sharded cannot merge an adapter; merge it into its base model first")
    most = found.pretrained.config.get("max_position_embeddings")
    lengths = [settings.protocol.window] if settings.text else []
    lengths += [plan.prompt + plan.generated for plan in (settings.speed, settings.serve) if plan]
    for length in lengths:
        if most and length > most:
            raise UserError(f"{path} reads at most {most} tokens (max_position_embeddings), not {length}")
    tokenizer = load_tokenizer(found.tokenizer_folder)
    batches: list[Batch] = []
    if settings.text:
        start = window_start(tokenizer, found.pretrained.shape.family)
        batches = make_batches(settings.text.text, tokenizer, settings.protocol, settings.actual_batch_size, start)
    return PreparedModel(found, dtype, tokenizer, batches)


def choose_dtype(found: FoundModel, dtype: str | None) -> Dtype:
    """Returns `dtype`, or the one that the model's config.json declares, or float32."""
    config = found.pretrained.config
    chosen = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
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


class Terminated(RunError):
    """SIGTERM as an exception, so that files and servers are cleaned up."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def merged(paths: list[str], comm: Communicator, *, is_first_on_node: bool) -> Iterator[list[str]]:
    """Finds all models and merges the LoRA of checkpoints and unfinished runs. Yields the paths to load. Collective."""
    with ExitStack() as stack:
        scratch = None
        if is_first_on_node:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="evaluate-")))
        with comm.patient() as waiting:
            found = waiting.all_or_raise(
                lambda: [find_or_merge(path, scratch / str(i)) for i, path in enumerate(paths)] if scratch else None
            )
        # The ranks of a node follow its first one.
        yield next(names for names in reversed(comm.gather_objects(found)[: comm.rank + 1]) if names)


def find_or_merge(path: str, out: Path) -> str:
    """Returns the path of a model to load: `out` for a checkpoint or an unfinished run, otherwise `path` itself."""
    if any((Path(path) / name).is_file() for name in (STATUS_FILE, STATE_FILE)):
        source = find_source(Path(path))
        if source.model is None:
            try:
                remarks = export(source, "hf", out)
            except NoRoom as error:
                raise UserError(f"{path} is to be merged first: {error}; TMPDIR names another folder") from None
            for remark in remarks:
                sys.stderr.write(f"note: {path}: {remark}\n")
            return str(out)
    find_model(path)
    return path


def serve(paths: list[str], settings: ServeSettings, precision: str) -> list[Served]:
    """Measures the models in a server. llama.cpp gets GGUF files of `precision`.

    Raises:
        Terminated: SIGTERM came.
        UserError: a model cannot be served.
    """

    def terminate(*_: object) -> NoReturn:
        raise Terminated("ended by SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    form = "hf" if settings.server == "vllm" else f"gguf-{precision}"
    with TemporaryDirectory(prefix="serve-") as scratch:
        models = [served_model(path, form, Path(scratch, str(i))) for i, path in enumerate(paths)]
        return measure_serving(models, settings)


def served_model(path: str, form: str, out: Path) -> ServedModel:
    """Finds or writes the files that a server loads. The only modelling file that may run is this package's."""
    found = find_model(path)
    require(not found.adapter, f"{path}: --serve cannot merge an adapter; merge it into its base model first")
    shape, folder = found.pretrained.shape, found.pretrained.folder
    trust = form == "hf" and shape.model_type.startswith(PRUNED)
    if form != "hf":
        export(find_source(folder), form, out)
        (folder,) = out.glob("*.gguf")
    elif trust:
        out.mkdir()
        copy_model(found.pretrained, out, lambda file, link: link.symlink_to(file.resolve()))
        folder = out
    return ServedModel(folder, form, found.pretrained.config["vocab_size"], trust, shape.family.vllm)
