"""What is to be measured, checked as a whole before any weight is read."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.models import Source, choose_dtype, find_model
from loraprune_ds.evaluate.perplexity import Batch, cut_windows, fixed_batches, sliding_batches, tokenize
from loraprune_ds.evaluate.speed import SpeedPlan
from loraprune_ds.evaluate.texts import EvaluationText
from loraprune_ds.evaluate.zeroshot import TaskPlan, check_tasks
from loraprune_ds.model.tokenizer import load_tokenizer
from loraprune_ds.zero.device import check_dtype

TOKENS_PER_BATCH = 2048  # the default batch: enough work at once, and logits of some hundred megabytes


@dataclass(frozen=True)
class PerplexityProtocol:
    """How the perplexity is taken. `stride` None: fixed windows, else sliding ones; `max_windows` None: all."""

    window: int = 128
    stride: int | None = None
    max_windows: int | None = None

    def __post_init__(self) -> None:
        if self.window < 2:
            raise UserError(f"--window must be at least 2 tokens; got {self.window}")
        if self.stride is not None and not 1 <= self.stride < self.window:
            raise UserError(f"--sliding must be from 1 to one less than --window {self.window}; got {self.stride}")
        if self.max_windows is not None and self.max_windows < 1:
            raise UserError(f"--max-windows must be at least 1; got {self.max_windows}")


@dataclass(frozen=True)
class EvaluationPlan:
    """What to measure.

    Attributes:
        text: None: no perplexity.
        dtype: None: each model's own.
        batch_size: windows, or a task's requests, at once on each rank; None: about TOKENS_PER_BATCH.
        speed: None: not measured.
        sharded: the weights are spread over the ranks by ZeRO-3, for models that fit no single device.
    """

    protocol: PerplexityProtocol
    text: EvaluationText | None = None
    dtype: str | None = None
    batch_size: int | None = None
    tasks: TaskPlan | None = None
    speed: SpeedPlan | None = None
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"--batch-size must be at least 1; got {self.batch_size}")
        if self.sharded and (self.tasks or self.speed):
            raise UserError("--sharded measures perplexity only; --tasks and --speed need the whole model on a rank")

    @property
    def rows(self) -> int:
        """The batch size in force."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // self.protocol.window)


@dataclass(frozen=True)
class Candidate:
    """A model whose input is checked: ready to be loaded and measured."""

    source: Source
    dtype: str
    tokenizer: PreTrainedTokenizerBase
    batches: list[Batch]


def check_candidates(paths: list[str], plan: EvaluationPlan) -> list[Candidate]:
    """Raises UserError, one line, for anything that can be wrong with the input."""
    if plan.tasks:
        check_tasks(plan.tasks)
    candidates = [_check_candidate(path, plan) for path in paths]
    for other in candidates[1:]:
        if not _same_tokens(candidates[0].batches, other.batches):
            raise UserError(
                f"{paths[0]} and {other.source.path} read the text as different tokens: "
                "their perplexities do not compare"
            )
    return candidates


def _check_candidate(path: str, plan: EvaluationPlan) -> Candidate:
    source = find_model(path)
    dtype = choose_dtype(source, plan.dtype)
    if plan.sharded:
        check_dtype(dtype)
        if source.adapter:
            raise UserError(f"{path}: --sharded cannot merge an adapter; merge it into its base model first")
    _check_positions(source, plan)
    tokenizer = load_tokenizer(source.tokenizer_folder)
    return Candidate(source, dtype, tokenizer, _cut(plan.text.text, tokenizer, plan) if plan.text else [])


def _check_positions(source: Source, plan: EvaluationPlan) -> None:
    most = source.pretrained.config.get("max_position_embeddings")
    lengths = [plan.protocol.window] if plan.text else []
    if plan.speed:
        lengths.append(plan.speed.prompt + plan.speed.generated)
    for length in lengths:
        if most and length > most:
            raise UserError(f"{source.path} reads at most {most} tokens (max_position_embeddings), not {length}")


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, plan: EvaluationPlan) -> list[Batch]:
    window, stride, most = plan.protocol.window, plan.protocol.stride, plan.protocol.max_windows
    if stride is None:
        return fixed_batches(cut_windows(text, tokenizer, window, most), plan.rows)
    token_ids = tokenize(text, tokenizer, None if most is None else (most - 1) * stride + window)
    return sliding_batches(token_ids, window, stride, most, plan.rows)


def _same_tokens(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.input_ids, b.input_ids) for a, b in zip(ours, theirs, strict=True)
    )
