"""One evaluation: a model, or two side by side, on a text, on tasks and in parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from transformers import PreTrainedTokenizerBase

from loraprune_ds.config_types import Dtype
from loraprune_ds.engines import run_engine
from loraprune_ds.errors import require
from loraprune_ds.evaluate.answers import Generation, losses_of, write_answers
from loraprune_ds.evaluate.settings import EvaluationSettings
from loraprune_ds.evaluate.tasks import run_tasks
from loraprune_ds.files import JsonObject
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.models import Ids, ModelSource, choose_dtype, find_model, load_model
from loraprune_ds.generate.writer import Writer
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.perplexity import Labelled, Perplexity, Progress, measure_perplexity
from loraprune_ds.model.shape import ModelShape, cached_numel
from loraprune_ds.pretrained.tokenizer import Starts, load_tokenizer, text_starts
from loraprune_ds.pretrained.windows import split_batches
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import fast_half_products


@dataclass(frozen=True)
class PreparedModel:
    """A model with the input of its measurements."""

    source: ModelSource
    dtype: Dtype
    tokenizer: PreTrainedTokenizerBase
    starts: Starts
    batches: Sequence[Labelled]  # of the text
    prompts: list[list[int]]  # ids of --answers

    def load(self, device: torch.device) -> Writer:
        """Loads the model, which can then write answers to the prompts."""
        model = load_model(self.source, self.dtype, device)
        return Writer(model, self.tokenizer, self.prompts, self.starts.target)


@dataclass(frozen=True)
class ModelCost:
    """Costs of a model on any hardware."""

    parameters: int  # of the whole model. A tied head counts once
    linear_parameters: int  # of the decoder layers' linears, without biases
    weight_bytes: int
    # added to the cache: sum over layers of 2 · kv heads · head_dim · element size
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Measurement:
    """All results of one model. `removed_fraction`: of the dense model's parameters, None where that is unknown."""

    path: str
    kind: str
    method: str | None
    model_type: str
    dtype: str
    removed_fraction: float | None
    cost: ModelCost
    perplexity: Perplexity | None
    tasks: JsonObject | None
    answers: Generation | None = None


def evaluate(
    paths: list[str],
    settings: EvaluationSettings,
    comm: Communicator,
    progress: Progress = lambda rounds, _: rounds,
) -> list[Measurement]:
    """Measures a model, and a second, dense one. Collective. Answers are on rank 0 only."""
    models = comm.all_or_raise(lambda: prepare_models(paths, settings))
    dense = models[1].source.pretrained.shape.total_numel() if len(models) > 1 else None
    measurements: list[Measurement] = []
    writers: list[Writer] = []
    for prepared in models:
        with fast_half_products(prepared.dtype):
            measurement, writer = _measure(prepared, dense, settings, comm, progress)
        measurements.append(measurement)
        if writer is not None:
            writers.append(writer)
    if settings.answers:
        text = None
        if settings.text:
            device = comm.device
            batches = ((ids.to(device), labels.to(device)) for ids, labels in models[0].batches)
            text = settings.text.name, batches
        with fast_half_products(models[0].dtype):
            answers = write_answers(writers, settings.answers, settings.batch_size, text, progress)
        for i, generation in enumerate(answers):
            measurements[i] = replace(measurements[i], answers=generation)
    return measurements


def prepare_models(paths: list[str], settings: EvaluationSettings) -> list[PreparedModel]:
    """Finds all models, checks the settings against them, and tokenises the text for each."""
    models = [_prepare(path, settings) for path in paths]
    first = models[0]
    for model in models[1:]:
        names = f"{paths[0]} and {model.source.path}"
        pairs = zip_longest(first.batches, model.batches)
        require(
            all(a and b and all(map(torch.equal, a, b)) for a, b in pairs),
            f"{names} tokenise the text differently, so their perplexities are not comparable",
        )
        require(
            not settings.answers or first.tokenizer.get_vocab() == model.tokenizer.get_vocab(),
            f"{names} have different tokenizers; --answers cannot compare them",
        )
    return models


def _prepare(path: str, settings: EvaluationSettings) -> PreparedModel:
    source = find_model(path)
    dtype = choose_dtype(source, settings.dtype)
    if settings.sharded:
        run_engine(sharded=True).check_device(dtype)
        require(
            not source.adapter,
            f"{path}: --sharded cannot merge an adapter; merge it into its base model first",
        )
    config = source.pretrained.config
    shape = source.pretrained.shape
    most = config.get("max_position_embeddings")
    window = settings.window
    require(
        not settings.text or not most or window <= most,
        f"{path} reads at most {most} tokens (max_position_embeddings), not {window}",
    )
    tokenizer = load_tokenizer(source.tokenizer_folder)
    starts = text_starts(tokenizer, shape.family, config)
    batches: list[Labelled] = []
    if settings.text:
        batches = split_batches(
            settings.text.text,
            tokenizer,
            settings.window,
            settings.max_windows,
            starts,
            settings.actual_batch_size,
            shape.vocab_size,
        )
    prompts: list[Ids] = []
    if settings.answers:
        limits = path, most, shape.vocab_size
        prompts = encode_prompts(settings.answers, tokenizer, limits, "--answers")
    return PreparedModel(source, dtype, tokenizer, starts, batches, prompts)


def count_cost(shape: ModelShape, element_size: int) -> ModelCost:
    """Counts the costs with parameters of `element_size` bytes."""
    return ModelCost(
        parameters=shape.total_numel(),
        linear_parameters=shape.linear_numel(),
        weight_bytes=shape.total_numel() * element_size,
        kv_bytes_per_token=cached_numel(shape) * element_size,
    )


def _measure(
    prepared: PreparedModel,
    dense: int | None,
    settings: EvaluationSettings,
    comm: Communicator,
    progress: Progress,
) -> tuple[Measurement, Writer | None]:
    """Measures all but answers. Returns the model for these, which need all models in memory."""
    source = prepared.source
    shape = source.pretrained.shape
    perplexity = tasks = writer = None
    if settings.sharded and prepared.batches:
        perplexity = _measure_sharded(prepared, comm, progress)
    elif prepared.batches or settings.tasks or settings.answers:
        writer = comm.all_or_raise(lambda: prepared.load(comm.device))
        if prepared.batches:
            losses = losses_of(writer.model)
            perplexity = measure_perplexity(losses, prepared.batches, comm, progress)
        if settings.tasks:
            tasks = run_tasks(settings.tasks, writer, settings.actual_batch_size, comm)
    first = shape.first
    if "name" in first:  # an export
        dense = first["parameters"]
    removed_fraction = None if dense is None else 1 - shape.total_numel() / dense
    element_size = DTYPES[prepared.dtype].itemsize
    measurement = Measurement(
        path=source.path,
        kind=source.kind,
        method=source.method,
        model_type=shape.model_type,
        dtype=prepared.dtype,
        removed_fraction=removed_fraction,
        cost=count_cost(shape, element_size),
        perplexity=perplexity,
        tasks=tasks,
    )
    return measurement, writer if settings.answers else None


def _measure_sharded(prepared: PreparedModel, comm: Communicator, progress: Progress) -> Perplexity:
    """Measures a model that ZeRO-3 shards while it is loaded."""
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": prepared.dtype == "bfloat16"},
        "fp16": {"enabled": prepared.dtype == "float16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = run_engine(sharded=True).build_inference_engine(
        prepared.source.pretrained, "sdpa", prepared.dtype, ds_config
    )
    perplexity = measure_perplexity(
        lambda ids, labels: engine.infer(input_ids=ids, labels=labels),
        prepared.batches,
        comm,
        progress,
    )
    engine.release()  # the next model needs the memory
    return perplexity
