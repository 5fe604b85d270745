"""Turns prompts into ids, by the chat template of a model."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from loraprune_ds.errors import require
from loraprune_ds.generate.models import Ids
from loraprune_ds.generate.prompts import AnswerSettings
from loraprune_ds.pretrained.tokenizer import check_ids, rendering

# of a model: its path, the most tokens that it reads, its vocab_size
Limits = tuple[str, int | None, int]


def encode_prompts(
    settings: AnswerSettings,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    option: str,
    **of_template: Any,
) -> list[Ids]:
    """Returns the ids of each prompt: by the model's chat template, or as plain text if it has none.

    Raises:
        UserError: the template refuses a prompt, or the model cannot read it. The line names `option`, file and row.
    """
    path, most, vocab_size = limits
    new = settings.max_new_tokens
    encoded: list[Ids] = []
    for prompt in settings.prompts:
        where = f"{option}: {settings.name}, row {prompt.row}"
        if tokenizer.chat_template:
            with rendering(where, path, prompt.messages):
                encoding: Any = tokenizer.apply_chat_template(
                    prompt.messages, add_generation_prompt=True, return_dict=True, **of_template
                )
        else:
            encoding = tokenizer("\n\n".join(message["content"] for message in prompt.messages))
        ids = list(encoding["input_ids"])
        check_ids(max(ids, default=0), vocab_size, tokenizer, where)
        require(
            not most or len(ids) + new <= most,
            f"{where}: {path} reads at most {most} tokens (max_position_embeddings), "
            f"not a prompt of {len(ids)} tokens and {new} new ones",
        )
        encoded.append(ids)
    return encoded
