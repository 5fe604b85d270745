"""Settings of an evaluation, and models whose input is checked before any weight is read."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.evaluation_text import EvaluationText
from loraprune_ds.evaluate.models import FoundModel, choose_dtype, find_model
from loraprune_ds.evaluate.perplexity import Batch, PerplexityProtocol, make_batches
from loraprune_ds.evaluate.serving import ServeSettings
from loraprune_ds.evaluate.speed_settings import SpeedSettings
from loraprune_ds.evaluate.zeroshot import TaskSettings, check_tasks
from loraprune_ds.model.tokenizer import load_tokenizer, window_start
from loraprune_ds.zero.device import check_dtype

TOKENS_PER_BATCH = 2048  # the default: enough work at once, and logits of some hundred megabytes


@dataclass(frozen=True)
class EvaluationSettings:
    """Says what to measure, and how.

    Attributes:
        text: None: no perplexity.
        dtype: None: each model's own.
        batch_size: windows or requests of a task at once on each rank. None: about TOKENS_PER_BATCH.
        tasks, speed, serve: None: not measured.
        sharded: ZeRO-3 spreads the weights over the ranks, for models that fit no single device.
    """

    protocol: PerplexityProtocol
    text: EvaluationText | None = None
    dtype: str | None = None
    batch_size: int | None = None
    tasks: TaskSettings | None = None
    speed: SpeedSettings | None = None
    serve: ServeSettings | None = None
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1; got {self.batch_size}")
        if self.sharded and (self.tasks or self.speed or self.serve):
            raise UserError("--sharded measures perplexity only; --tasks, --speed and --serve need the whole model")

    @property
    def actual_batch_size(self) -> int:
        """Returns `batch_size`, or its default where there is none."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // self.protocol.window)


@dataclass(frozen=True)
class PreparedModel:
    """Holds what is needed to load and measure a model."""

    found: FoundModel
    dtype: Dtype
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batch]


def prepare_models(paths: list[str], settings: EvaluationSettings) -> list[PreparedModel]:
    """Finds all models and tokenises the text for each.

    Raises:
        UserError: some input is wrong. The error is one line.
    """
    if settings.tasks:
        check_tasks(settings.tasks)
    models = [_prepare(path, settings) for path in paths]
    for other in models[1:]:
        if not _same_tokens(models[0].batches, other.batches):
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
    _check_positions(found, settings)
    tokenizer = load_tokenizer(found.tokenizer_folder)
    batches: list[Batch] = []
    if settings.text:
        start = window_start(tokenizer, found.pretrained.shape.family)
        batches = make_batches(settings.text.text, tokenizer, settings.protocol, settings.actual_batch_size, start)
    return PreparedModel(found, dtype, tokenizer, batches)


def _check_positions(found: FoundModel, settings: EvaluationSettings) -> None:
    most = found.pretrained.config.get("max_position_embeddings")
    lengths = [settings.protocol.window] if settings.text else []
    lengths += [plan.prompt + plan.generated for plan in (settings.speed, settings.serve) if plan]
    for length in lengths:
        if most and length > most:
            raise UserError(f"{found.path} reads at most {most} tokens (max_position_embeddings), not {length}")


def _same_tokens(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.input_ids, b.input_ids) for a, b in zip(ours, theirs, strict=True)
    )
