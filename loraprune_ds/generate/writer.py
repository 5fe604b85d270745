"""Lets a loaded model write after prompts, in batches."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList

from loraprune_ds.generate.models import Ids
from loraprune_ds.pretrained.tokenizer import target_start


def end_ids(named: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids that end a text: those that a model's settings name, if any, and the tokenizer's."""
    ids = (*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id)
    return {token for token in ids if isinstance(token, int)}


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
        self, prompts: list[Ids], choose: LogitsProcessorList | None = None, **how: Any
    ) -> Iterator[Ids]:
        """Yields the new ids for each prompt of a batch, with the end id if the model wrote one.

        Args:
            choose: changes the logits before a token is chosen.
            how: settings of generation such as max_new_tokens. They replace the model's own, which may forbid
                repetition.
        """
        model, ends, width = self.model, self.ends, max(map(len, prompts))
        ids = torch.tensor(
            [[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device
        )
        mask = torch.tensor(
            [[0] * (width - len(each)) + [1] * len(each) for each in prompts], device=model.device
        )
        ended_by = {"eos_token_id": sorted(ends) or None, "pad_token_id": min(ends, default=0)}
        if model.config.is_encoder_decoder:
            # of its outputs
            width, ended_by["decoder_start_token_id"] = 1, target_start(model.config.to_dict())
        # A diverged model has NaN among its logits. Its answers are worthless, and sampling them must not raise.
        model.generation_config = GenerationConfig(**ended_by, **how, remove_invalid_values=True)
        generate: Any = model.generate  # a decorator hides its type
        for row in generate(input_ids=ids, attention_mask=mask, logits_processor=choose)[
            :, width:
        ].tolist():
            yield row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
