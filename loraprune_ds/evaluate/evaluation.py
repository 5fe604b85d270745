"""One evaluation: a model, or two side by side, on a text, on tasks, in seconds and in parameters.

For speed the models take turns in every round, so other work on the machine slows all of them equally.
"""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from operator import mul
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loraprune_ds.config_types import Dtype
from loraprune_ds.engines import run_engine
from loraprune_ds.errors import require
from loraprune_ds.evaluate.answers import Generation, losses_of, write_answers
from loraprune_ds.evaluate.settings import EvaluationSettings, SpeedSettings
from loraprune_ds.evaluate.tasks import run_tasks
from loraprune_ds.files import JsonObject
from loraprune_ds.generate.encoding import encode_prompts
from loraprune_ds.generate.models import Ids, ModelSource, choose_dtype, find_model, load_model
from loraprune_ds.generate.writer import Writer
from loraprune_ds.model.classes import config_object, sliding_window
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.perplexity import Labelled, Perplexity, Progress, measure_perplexity
from loraprune_ds.model.shape import ModelShape, active_numel, attention_product, cached_numel
from loraprune_ds.pretrained.tokenizer import Starts, load_tokenizer, text_starts
from loraprune_ds.pretrained.windows import split_batches
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import fast_half_products

# transformers renamed this argument within the range that pyproject.toml allows.
CACHE = (
    "cache"
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters
    else "past_key_values"
)


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
class Macs:
    """Multiply-accumulates per token of a forward pass, without norms, rotations and activations."""

    # One per parameter of the decoder layers' linears, without experts that a token does not choose. A token passes
    # either the encoder or the decoder, so this and `attention` are half of their sum.
    linear: int
    attention: float  # sum over layers of 2 · query heads · head_dim · mean_context
    head: int  # vocabulary · hidden size. An embedding multiplies nothing
    total: float
    # positions that a token attends to, itself included, averaged over a window and all heads
    mean_context: float


@dataclass(frozen=True)
class ModelCost:
    """Costs of a model on any hardware."""

    parameters: int  # of the whole model. A tied head counts once
    linear_parameters: int  # of the decoder layers' linears, without biases
    weight_bytes: int
    # added to the cache: sum over layers of 2 · kv heads · head_dim · element size
    kv_bytes_per_token: int
    macs_per_token: Macs


@dataclass(frozen=True)
class Speed:
    """Speed of one model at batch size 1, by torch. Medians over the rounds."""

    prefill_tokens_per_second: float  # of a prompt in one pass, with logits of its last token only
    # of tokens written one by one after the prompt, with a key-value cache
    decode_tokens_per_second: float
    peak_bytes: int | None  # largest device memory beyond the weights. None on a CPU


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
    speed: Speed | None = None
    answers: Generation | None = None


def evaluate(
    paths: list[str],
    settings: EvaluationSettings,
    comm: Communicator,
    progress: Progress = lambda rounds, _: rounds,
) -> list[Measurement]:
    """Measures a model, and a second, dense one. Collective. Tasks, answers and speed are on rank 0 only."""
    models = comm.all_or_raise(lambda: prepare_models(paths, settings))
    dense = models[1].source.pretrained.shape.total_numel() if len(models) > 1 else None
    measurements: list[Measurement] = []
    writers: list[Writer] = []
    for prepared in models:
        # speed is measured outside, by torch's own products
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
    plan = settings.speed
    if plan:
        speeds = comm.on_rank_0(lambda: measure_speed([x.model for x in writers], plan))
        for i, speed in enumerate(speeds or []):
            measurements[i] = replace(measurements[i], speed=speed)
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
    lengths = [settings.window] if settings.text else []
    if settings.speed:
        lengths.append(settings.speed.prompt + settings.speed.generated)
    for length in lengths:
        require(
            not most or length <= most,
            f"{path} reads at most {most} tokens (max_position_embeddings), not {length}",
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


def count_cost(shape: ModelShape, config: JsonObject, window: int, element_size: int) -> ModelCost:
    """Counts the costs on windows of `window` tokens. `config` says which layers have sliding windows."""
    parts = len(shape.layer_lists)
    heads = [attention.queries for attention in shape.attention]
    if parts > 1:
        heads.append(sum(counts["cross_heads"] for counts in shape.counts))
    contexts = _contexts(shape, config, window)
    context = sum(map(mul, contexts, heads)) / sum(heads)
    linear = active_numel(shape) // parts
    # two products of one multiply-add each
    attention = attention_product(shape, context) / parts
    head = shape.vocab_size * shape.hidden_size
    return ModelCost(
        parameters=shape.total_numel(),
        linear_parameters=shape.linear_numel(),
        weight_bytes=shape.total_numel() * element_size,
        kv_bytes_per_token=cached_numel(shape) * element_size,
        macs_per_token=Macs(linear, attention, head, linear + attention + head, context),
    )


def _contexts(shape: ModelShape, config: JsonObject, window: int) -> list[float]:
    """Returns the mean context of each layer, and then of a decoder's cross-attention."""
    whole = _mean_context(window, None)
    if shape.family.has_encoder:
        encoder, decoder = shape.layer_lists
        # all heads see the whole window, except in the decoder's self-attention
        return [window] * len(encoder) + [whole] * len(decoder) + [window]
    settings = config_object(config)
    narrow = _mean_context(window, sliding_window(settings))
    # transformers finds the layers with a sliding window
    layers = DynamicCache(config=settings).layers
    sliding = [getattr(layer, "is_sliding", False) for layer in layers]
    # Layers that share keys and values are absent.
    types = getattr(settings, "layer_types", None) or ()
    sliding += [kind == "sliding_attention" for kind in types[len(layers) :]]
    return [narrow if is_narrow else whole for is_narrow in sliding]


def _mean_context(window: int, sliding_window: int | None) -> float:
    """Returns the mean over t = 1 … window of min(t, sliding_window)."""
    full = min(window, sliding_window or window)
    return (full * (full + 1) / 2 + (window - full) * full) / window


def _measure(
    prepared: PreparedModel,
    dense: int | None,
    settings: EvaluationSettings,
    comm: Communicator,
    progress: Progress,
) -> tuple[Measurement, Writer | None]:
    """Measures all but answers and speed. Returns the model for these two, which need all models in memory."""
    source = prepared.source
    shape = source.pretrained.shape
    perplexity = tasks = writer = None
    is_kept = settings.answers or settings.speed
    if settings.sharded and prepared.batches:
        perplexity = _measure_sharded(prepared, comm, progress)
    elif prepared.batches or settings.tasks or is_kept:
        writer = comm.all_or_raise(lambda: prepared.load(comm.device))
        if prepared.batches:
            losses = losses_of(writer.model)
            perplexity = measure_perplexity(losses, prepared.batches, comm, progress)
        if settings.tasks:
            tasks = run_tasks(settings.tasks, writer, settings.actual_batch_size, comm)
    dense = dense or source.dense_parameters
    removed_fraction = None
    if dense is not None:
        removed_fraction = 1 - shape.total_numel() / dense
    element_size = DTYPES[prepared.dtype].itemsize
    measurement = Measurement(
        path=source.path,
        kind=source.kind,
        method=source.method,
        model_type=shape.model_type,
        dtype=prepared.dtype,
        removed_fraction=removed_fraction,
        cost=count_cost(shape, source.pretrained.config, settings.window, element_size),
        perplexity=perplexity,
        tasks=tasks,
    )
    return measurement, writer if is_kept else None


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


def measure_speed(models: Sequence[PreTrainedModel], settings: SpeedSettings) -> list[Speed]:
    """Returns one result per model."""
    vocabulary = min(int(model.config.vocab_size) for model in models)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (1, settings.prompt), generator=generator)
    rounds: list[list[tuple[float, float, int | None]]] = []
    for _ in range(settings.rounds + 1):
        rounds.append([_run(model, prompt, settings.generated) for model in models])
    speeds: list[Speed] = []
    for of_model in zip(*rounds[1:], strict=True):  # the first is a warm-up
        prefill, decode, peaks = zip(*of_model, strict=True)
        speed = Speed(
            settings.prompt / statistics.median(prefill),
            settings.generated / statistics.median(decode),
            max((peak for peak in peaks if peak is not None), default=None),
        )
        speeds.append(speed)
    return speeds


@torch.no_grad()
def _run(model: PreTrainedModel, prompt: Tensor, generated: int) -> tuple[float, float, int | None]:
    """Reads `prompt` (1, tokens) and writes `generated` tokens. Returns the seconds of both, and the peak in bytes."""
    token_ids = prompt.to(model.device)
    device: Any = torch.get_device_module(model.device)
    before = None
    if model.device.type != "cpu":
        device.reset_peak_memory_stats()
        before = device.memory_allocated()
    begin = _now(device)
    logits, read = _prefill(model, token_ids)
    middle = _now(device)
    for _ in range(generated):
        logits = read(logits.argmax(-1))  # (1, 1, vocabulary)
    end = _now(device)
    peak = None if before is None else device.max_memory_allocated() - before
    return middle - begin, end - middle, peak


def _prefill(
    model: PreTrainedModel, token_ids: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Reads the prompt. Returns the last logits, and a function that reads further tokens into the same caches."""
    if not model.config.is_encoder_decoder:
        read = partial(model, use_cache=True, **{CACHE: DynamicCache(config=model.config)})
        output = read(input_ids=token_ids, logits_to_keep=1)
        return output.logits, lambda ids: read(input_ids=ids).logits
    config = model.get_decoder().config
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    encoder_outputs = model.get_encoder()(input_ids=token_ids)
    read = partial(model, use_cache=True, encoder_outputs=encoder_outputs, **{CACHE: cache})
    output = read(decoder_input_ids=token_ids[:, :1])
    return output.logits, lambda ids: read(decoder_input_ids=ids).logits


def _now(device: Any) -> float:
    """Returns the time once the device is idle, in seconds."""
    device.synchronize()
    return time.perf_counter()
