"""Lets a loaded model write after prompts, in batches."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList

from loraprune_ds.generate.models import Ids
from loraprune_ds.pretrained.tokenizer import target_start


def end_ids(named: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that end a text: those that a model's settings name, if any, and the tokenizer's."""
    ids = named if isinstance(named, list) else [named]
    return {token for token in [*ids, tokenizer.eos_token_id] if isinstance(token, int)}


def first_end(ids: Ids, ends: Collection[int]) -> int | None:
    """Returns how many ids there are up to the first that ends a text. None if no id does."""
    return next((i for i, token in enumerate(ids, 1) if token in ends), None)


@dataclass(frozen=True)
class Writer:
    """A loaded model, its tokenizer, and the ids of its prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Ids] = field(default_factory=list)
    start: int | None = None  # the first token of a decoder after an encoder

    @cached_property
    def ends(self) -> set[int]:
        """The ids that end a text, named by the model's settings or by its tokenizer."""
        settings: Any = self.model.generation_config
        return end_ids(settings.eos_token_id if settings else None, self.tokenizer)

    def write(
        self, prompts: list[Ids], choose: LogitsProcessorList | None = None, **settings: Any
    ) -> Iterator[Ids]:
        """Yields the new ids for each prompt of a batch, with the end id if the model wrote one.

        Args:
            choose: changes the logits before a token is chosen.
            settings: of generation, such as max_new_tokens. They replace the model's own, which may forbid repetition.
        """
        model = self.model
        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        settings["eos_token_id"] = sorted(self.ends) or None
        settings["pad_token_id"] = min(self.ends, default=0)
        if model.config.is_encoder_decoder:
            width = 1  # of its outputs, which begin with a start token
            settings["decoder_start_token_id"] = target_start(model.config.to_dict())
        # A diverged model has NaN among its logits. Its answers are worthless, and sampling them must not raise.
        model.generation_config = GenerationConfig(**settings, remove_invalid_values=True)
        generate: Any = model.generate  # a decorator hides its type
        rows: Tensor = generate(
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            logits_processor=choose,
        )
        for row in rows[:, width:].tolist():
            yield row[: first_end(row, self.ends)]
