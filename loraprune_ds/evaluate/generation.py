"""Texts that a loaded model writes after its prompts."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Ids = list[int]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that end a text, named by the model's settings or by its tokenizer."""
    settings: Any = model.generation_config
    named = settings.eos_token_id if settings else None
    ids = (*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id)
    return {token for token in ids if isinstance(token, int)}


def generate(model: PreTrainedModel, prompts: list[Ids], ends: set[int], **how: Any) -> Iterator[Ids]:
    """Yields the new ids for each prompt of a batch, with the id that ends them if the model wrote one.

    Args:
        ends: ids that end a text, see `end_ids`.
        how: settings of generation such as max_new_tokens. They replace the model's own, which may forbid repetition.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    ended_by = {"eos_token_id": sorted(ends) or None, "pad_token_id": min(ends, default=0)}
    # A diverged model has NaN among its logits. Its answers are worthless, and sampling them must not raise.
    model.generation_config = GenerationConfig(**ended_by, **how, remove_invalid_values=True)
    write: Any = model.generate  # a decorator hides its type
    for row in write(input_ids=ids, attention_mask=mask)[:, width:].tolist():
        yield row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
