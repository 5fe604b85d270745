"""One evaluation: a model, or two side by side, on a text, on tasks and against the clock."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from loraprune_ds.evaluate.cost import ModelCost, count_cost
from loraprune_ds.evaluate.models import FoundModel, load_model
from loraprune_ds.evaluate.perplexity import Losses, Perplexity, Progress, measure_perplexity
from loraprune_ds.evaluate.serving import Served
from loraprune_ds.evaluate.settings import EvaluationSettings, PreparedModel, prepare_models
from loraprune_ds.evaluate.speed import Speed, measure_speed
from loraprune_ds.evaluate.zeroshot import run_tasks
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.exported_config import DEFAULT_SLIDING_WINDOW
from loraprune_ds.model.logits import Head, logits_transform, output_head
from loraprune_ds.model.token_loss import token_losses
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.engine import build_inference_engine
from loraprune_ds.zero.half_products import fast_half_products
from loraprune_ds.zero.training_engine import release


@dataclass(frozen=True)
class Measurement:
    """Holds everything about one model.

    Attributes:
        method: criterion and ranking of a run.
        removed_fraction: of the dense model's parameters. None where that is unknown.
    """

    path: str
    kind: str
    method: str | None
    model_type: str
    dtype: str
    removed_fraction: float | None
    cost: ModelCost
    perplexity: Perplexity | None
    tasks: dict[str, Any] | None
    speed: Speed | None
    served: Served | None = None


@dataclass(frozen=True)
class _Quality:
    perplexity: Perplexity | None = None
    tasks: dict[str, Any] | None = None
    model: PreTrainedModel | None = None  # kept if its speed is measured, too, which needs all models at once


def evaluate(
    paths: list[str], settings: EvaluationSettings, comm: Communicator, progress: Progress = lambda rounds: rounds
) -> list[Measurement]:
    """Measures the models that `paths` name. A second one is the dense model that the first is compared with.

    Downloads and conversions are in the cache already, so that no rank waits for hours here. Results of tasks and
    speed are on rank 0 only. Collective.

    Raises:
        UserError: some input is wrong. All ranks raise the same line, before anything long.
    """
    models = comm.all_or_raise(lambda: prepare_models(paths, settings))
    qualities = []
    for model in models:
        with fast_half_products(model.dtype):  # speed is measured outside, by torch's own products
            qualities.append(_measure_quality(model, settings, comm, progress))
    speeds: list[Speed] | None = None
    if speed_settings := settings.speed:
        loaded = [quality.model for quality in qualities if quality.model is not None]
        speeds = comm.on_rank_0(lambda: measure_speed(loaded, speed_settings))
    dense = models[1].found.pretrained.shape.total_numel() if len(models) > 1 else None
    return [
        _describe(model, settings.protocol.window, dense, quality, speed)
        for model, quality, speed in zip(models, qualities, speeds or [None] * len(models), strict=True)
    ]


def _measure_quality(
    prepared: PreparedModel, settings: EvaluationSettings, comm: Communicator, progress: Progress
) -> _Quality:
    """Loads one model and measures its perplexity and tasks."""
    if not (prepared.batches or settings.tasks or settings.speed):
        return _Quality()
    if settings.sharded:
        return _Quality(_measure_sharded(prepared, comm, progress))
    model = comm.all_or_raise(lambda: load_model(prepared.found, prepared.dtype, comm.device))
    perplexity = tasks = None
    if prepared.batches:
        perplexity = measure_perplexity(_losses_of(model), prepared.batches, comm, progress)
    if settings.tasks:
        tasks = run_tasks(settings.tasks, model, prepared.tokenizer, settings.actual_batch_size, comm)
    return _Quality(perplexity, tasks, model if settings.speed else None)


def _losses_of(model: PreTrainedModel) -> Losses:
    decoder, head = model.get_decoder(), Head(output_head(model).weight, logits_transform(model.config))

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        return token_losses(decoder(input_ids=input_ids, use_cache=False).last_hidden_state, head, labels)

    return losses


def _measure_sharded(prepared: PreparedModel, comm: Communicator, progress: Progress) -> Perplexity:
    """Measures a model that ZeRO-3 shards at birth. No rank ever holds more than a whole layer or embedding."""
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": prepared.dtype == "bfloat16"},
        "fp16": {"enabled": prepared.dtype == "float16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = build_inference_engine(prepared.found.pretrained, "sdpa", prepared.dtype, ds_config)

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        return engine(input_ids=input_ids, labels=labels)

    perplexity = measure_perplexity(losses, prepared.batches, comm, progress)
    release(engine)  # the next model needs the room
    return perplexity


def _describe(
    prepared: PreparedModel, window: int, dense: int | None, quality: _Quality, speed: Speed | None
) -> Measurement:
    """Puts one model's results together. `dense`: parameters of the dense model, if the user named one."""
    found = prepared.found
    shape = found.pretrained.shape
    dense = dense or found.dense_parameters
    return Measurement(
        path=found.path,
        kind=found.kind,
        method=found.method,
        model_type=shape.model_type,
        dtype=prepared.dtype,
        removed_fraction=None if dense is None else 1 - shape.total_numel() / dense,
        cost=count_cost(shape, window, _sliding_window(found), DTYPES[prepared.dtype].itemsize),
        perplexity=quality.perplexity,
        tasks=quality.tasks,
        speed=speed,
    )


def _sliding_window(found: FoundModel) -> int | None:
    """Returns the limit of the model's attention. Llama has none, even if its config.json names one."""
    if not found.pretrained.shape.model_type.endswith("mistral"):
        return None
    return found.pretrained.config.get("sliding_window", DEFAULT_SLIDING_WINDOW)
