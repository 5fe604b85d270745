"""One evaluation: a model, or two side by side, on a text, on tasks and against the clock."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.evaluate.candidates import Candidate, EvaluationPlan, check_candidates
from loraprune_ds.evaluate.cost import Cost, count_cost
from loraprune_ds.evaluate.models import Source, load_model
from loraprune_ds.evaluate.perplexity import Losses, Perplexity, measure_batches
from loraprune_ds.evaluate.speed import Speed, measure_speed
from loraprune_ds.evaluate.zeroshot import run_tasks
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.exported_config import DEFAULT_SLIDING_WINDOW
from loraprune_ds.model.token_loss import token_losses
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import accelerator
from loraprune_ds.zero.engine import build_inference_engine
from loraprune_ds.zero.half_products import fast_half_products
from loraprune_ds.zero.release import release

Watch = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Measured:
    """Everything about one model.

    Attributes:
        method: criterion and ranking, where the model is of a run.
        removed_fraction: of the dense model's parameters; None where that is unknown.
    """

    path: str
    kind: str
    method: str | None
    model_type: str
    dtype: str
    removed_fraction: float | None
    cost: Cost
    perplexity: Perplexity | None
    tasks: dict[str, Any] | None
    speed: Speed | None


@dataclass(frozen=True)
class _Quality:
    perplexity: Perplexity | None = None
    tasks: dict[str, Any] | None = None


def evaluate(
    paths: list[str], plan: EvaluationPlan, comm: Communicator, watch: Watch = lambda rounds: rounds
) -> list[Measured]:
    """Measures the models that `paths` name; of two, the second is the dense one that the first is held against.

    What had to be downloaded or converted is in the cache already: the ranks do not wait for hours here.

    Tasks and speed are in the result of rank 0 only. Collective.

    Raises:
        UserError: something cannot be used; all ranks raise the same line, before anything long.
    """
    candidates = comm.all_or_raise(lambda: check_candidates(paths, plan))
    models: list[PreTrainedModel] = []  # only where their speed is measured, which needs all at once
    qualities: list[_Quality] = []
    for candidate in candidates:
        with fast_half_products(candidate.dtype):  # not where speed is measured: that is torch's own
            qualities.append(_measure_quality(candidate, plan, comm, watch, models))
    speeds: list[Any] = [None] * len(candidates)
    if plan.speed and comm.rank == 0:
        speeds = measure_speed(models, plan.speed)
    dense = candidates[1].source.pretrained.shape.total_numel() if len(candidates) > 1 else None
    return [
        _describe(candidate, plan.protocol.window, dense, quality, speed)
        for candidate, quality, speed in zip(candidates, qualities, speeds, strict=True)
    ]


def _measure_quality(
    candidate: Candidate, plan: EvaluationPlan, comm: Communicator, watch: Watch, keep: list[PreTrainedModel]
) -> _Quality:
    """Loads one model and measures how good it is; it goes into `keep` if its speed is to be measured too."""
    if not (candidate.batches or plan.tasks or plan.speed):
        return _Quality()
    device = torch.device(accelerator().current_device_name())
    if plan.sharded:
        return _Quality(_measure_sharded(candidate, comm, device, watch))
    model = comm.all_or_raise(lambda: load_model(candidate.source, candidate.dtype, device))
    if plan.speed:
        keep.append(model)

    decoder, head = model.get_decoder(), cast(nn.Linear, model.get_output_embeddings())

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        return token_losses(decoder(input_ids=input_ids, use_cache=False).last_hidden_state, head.weight, labels)

    perplexity = _measure_perplexity(losses, candidate, comm, device, watch) if candidate.batches else None
    if not plan.tasks:
        return _Quality(perplexity)
    ranks = {"rank": comm.rank, "world_size": comm.world_size}
    return _Quality(perplexity, run_tasks(plan.tasks, model, candidate.tokenizer, plan.rows, **ranks))


def _measure_perplexity(
    losses: Losses, candidate: Candidate, comm: Communicator, device: torch.device, watch: Watch
) -> Perplexity:
    return measure_batches(
        losses,
        candidate.batches,
        device=device,
        rank=comm.rank,
        world_size=comm.world_size,
        sum_over_ranks=comm.all_reduce,
        watch=watch,
    )


def _measure_sharded(candidate: Candidate, comm: Communicator, device: torch.device, watch: Watch) -> Perplexity:
    """Of the model born sharded over all ranks; nothing above one layer or the embedding is ever whole on one."""
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": candidate.dtype == "bfloat16"},
        "fp16": {"enabled": candidate.dtype == "float16"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine = build_inference_engine(candidate.source.pretrained, "sdpa", candidate.dtype, ds_config)

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        return engine(input_ids=input_ids, labels=labels)

    perplexity = _measure_perplexity(losses, candidate, comm, device, watch)
    release(engine)  # the model beside it comes next
    return perplexity


def _describe(candidate: Candidate, window: int, dense: int | None, quality: _Quality, speed: Speed | None) -> Measured:
    source = candidate.source
    shape = source.pretrained.shape
    dense = dense or source.dense_parameters
    return Measured(
        path=source.path,
        kind=source.kind,
        method=source.method,
        model_type=shape.model_type,
        dtype=candidate.dtype,
        removed_fraction=None if dense is None else 1 - shape.total_numel() / dense,
        cost=count_cost(shape, window, _sliding_window(source), DTYPES[candidate.dtype].itemsize),
        perplexity=quality.perplexity,
        tasks=quality.tasks,
        speed=speed,
    )


def _sliding_window(source: Source) -> int | None:
    """Llama's attention has none, whatever its config.json says."""
    if not source.pretrained.shape.model_type.endswith("mistral"):
        return None
    return source.pretrained.config.get("sliding_window", DEFAULT_SLIDING_WINDOW)
