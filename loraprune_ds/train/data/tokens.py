"""Makes tokens and labels from text. Documents fill windows. Only the answers in instructions and chats are learnt."""

import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from loraprune_ds.config import DataSource
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.pretrained.tokenizer import (
    begin_with,
    eos_id,
    rendering,
    token_ids,
    tokenize_pairs,
)
from loraprune_ds.train.data.samples import Samples

TEXTS_AT_ONCE = 1000  # texts per call of the tokenizer
PROMPT = "Answer the request.\n\n### Request\n{prompt}\n\n### Answer\n"
PROMPT_WITH_INPUT = "Answer the request about the text.\n\n### Request\n{prompt}\n\n### Text\n{input}\n\n### Answer\n"
TOOLS = "tools"
# the first form that a row has is used
CHAT_FIELDS = (("messages",), ("conversations",), ("prompt", "completion"))
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # other roles have the same name there
ROLES = ("system", "developer", "user", "assistant", "tool")
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")

T = TypeVar("T")
TokenizedRow = tuple[list[int], list[int]]  # ids and labels
Instruction = tuple[str, str]  # prompt and response
Message = dict[str, Any]
Span = tuple[int, int]  # of characters
Marked = tuple[str, list[Span]]  # the text of a conversation, and the spans that are learnt


def make_instruction(prompt: str, about: str, response: str) -> Instruction:
    """Puts a request into the template, with the text `about` unless it is empty."""
    template = PROMPT_WITH_INPUT if about else PROMPT
    return template.format(prompt=prompt, input=about), response


def pack_documents(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    max_samples: int | None,
    start: int | None,
) -> Samples:
    """Concatenates all texts, with the tokenizer's EOS between them, and splits them into windows.

    An incomplete last window is dropped. `start` replaces each window's first id (`Starts.window`).
    """
    eos = eos_id(tokenizer)
    stream = array("i")
    for batch in in_batches(text for text in texts if text):
        for ids in token_ids(batch, tokenizer, special=True):
            if stream and eos is not None and stream[-1] != eos:  # some tokenizers add EOS
                stream.append(eos)
            stream.extend(ids)
        if max_samples is not None and len(stream) >= max_samples * window:
            break
    count = len(stream) // window
    if max_samples is not None:
        count = min(max_samples, count)
    windows = _tensor(stream[: count * window]).view(count, window)
    return Samples.of_windows(begin_with(windows, start))


def collect_rows(
    rows: Iterable[TokenizedRow], window: int, max_samples: int | None, places: Iterable[str]
) -> Samples:
    """Makes one sample from each row, cut at the window. Rows without predictions are left out.

    `places` name the origins of the rows.
    """
    ids = array("i")
    labels = array("i")
    starts = array("q", [0])
    left_out = 0
    first_left_out = ""
    for (row_ids, row_labels), place in zip(rows, places, strict=False):
        # no token predicts the first
        if all(label == IGNORE_INDEX for label in row_labels[1:window]):
            left_out += 1
            first_left_out = first_left_out or place
            continue
        ids.extend(row_ids[:window])
        labels.extend(row_labels[:window])
        starts.append(len(ids))
        if len(starts) - 1 == max_samples:
            break
    columns = {"input_ids": _tensor(ids), "labels": _tensor(labels)}
    return Samples(columns, _tensor(starts), window, left_out, first_left_out)


def tokenize_instructions(
    instructions: Iterable[Instruction],
    tokenizer: PreTrainedTokenizerBase,
    start: int | None = None,
) -> Iterator[TokenizedRow]:
    """Makes ids and labels from instructions by `tokenize_pairs`. The prompt is not learnt."""
    for batch in in_batches(instructions):
        for prompt, response in tokenize_pairs(batch, tokenizer, start):
            yield prompt + response, [IGNORE_INDEX] * len(prompt) + response


def _tensor(values: "array[int]") -> Tensor:
    return torch.from_numpy(np.asarray(values))


def in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, TEXTS_AT_ONCE)):
        yield batch


@dataclass(frozen=True)
class Chat:
    """Holds a conversation. The first `context` messages are not learnt, whatever their role."""

    messages: list[Message]
    tools: list[Any] | None = None
    context: int = 0


def chat_fields(available: set[str], source: DataSource) -> list[str]:
    """Returns the fields that hold conversations. Raises UserError if there are none."""
    for fields in CHAT_FIELDS:
        if available.issuperset(fields):
            return [*fields, *available.intersection([TOOLS])]
    raise UserError(
        f"{source.section}.format chat: {source.path} has none of messages, conversations, and prompt with completion; "
        f"it has {', '.join(sorted(available))}"
    )


def read_chat(row: Mapping[str, Any]) -> Chat:
    """Reads a conversation in the format of TRL or ShareGPT. Raises UserError for any other format."""
    tools = _tools(row.get(TOOLS))
    if "messages" in row or "conversations" in row:
        conversation = row.get("messages") or row.get("conversations")
        return Chat(_messages(conversation), tools)
    prompt = _messages(row.get("prompt"), "user")
    completion = _messages(row.get("completion"), "assistant")
    return Chat(prompt + completion, tools, context=len(prompt))


def _tools(value: Any) -> list[Any] | None:
    tools = value
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            tools = json.loads(value)
    if not isinstance(tools, list | None):
        raise UserError(f"tools must be a list or its JSON; got {value!r:.80}")
    return tools


def _messages(value: Any, role: str | None = None) -> list[Message]:
    """Reads a list of messages. With `role` a text counts as one message with that role."""
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list | None):
        raise UserError(f"a conversation must be a list of messages; got {value!r:.80}")
    return [_message(message) for message in value or ()]


def _message(value: Any) -> Message:
    if isinstance(value, dict) and isinstance(value.get("from"), str):
        speaker = value["from"]
        value = {"role": SHAREGPT_ROLES.get(speaker, speaker), "content": value.get("value")}
    if not (isinstance(value, dict) and isinstance(value.get("role"), str)):
        raise UserError(
            f"a message must have role and content, or from and value; got {value!r:.80}"
        )
    # Arrow fills absent keys with null
    return {key: item for key, item in value.items() if item is not None}


class NotAPrefix(UserError):
    """The rendered conversation does not begin with its first messages, rendered alone."""


class ChatTemplate:
    """Renders conversations as text and finds the characters of the assistant.

    A template with `{% generation %}` marks its turns. Otherwise a turn lies between two rendered prefixes of the
    conversation: the messages before it, and these with it. The conversation must begin with both prefixes, apart from
    a thought that the prompt begins. If a template changes earlier turns, only the last answer is learnt.

    Raises:
        UserError: the tokenizer has no template, or no offsets of its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.name = tokenizer.name_or_path or "the tokenizer"
        require(
            tokenizer.chat_template,
            f"data.format chat needs a chat template, and the tokenizer of {self.name} has none; "
            "write chat_template.jinja next to the tokenizer, or use data.format instruction",
        )
        require(
            tokenizer.is_fast,
            f"data.format chat needs a fast tokenizer; {self.name} has a slow one",
        )
        self._tokenizer = tokenizer

    def check_roles(self, chat: Chat) -> None:
        """Checks that every role is common or occurs in the template. Most templates accept any word."""
        template = self._tokenizer.get_chat_template(tools=chat.tools)
        roles = {message["role"] for message in chat.messages}
        for role in roles.difference(ROLES):
            require(
                f"'{role}'" in template or f'"{role}"' in template,
                f"role {role!r} is none of {', '.join(ROLES)}, and the template of {self.name} lacks it",
            )

    def tokenize(self, marked: Iterable[Marked]) -> Iterator[TokenizedRow]:
        """Makes ids and labels from the results of `mark`. A token is learnt if any of its characters is in a span."""
        for batch in in_batches(marked):
            texts, spans = map(list, zip(*batch, strict=True))
            encoded: Any = self._tokenizer(
                texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            rows = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
            for ids, offsets, row_spans in rows:
                begins, ends = np.reshape(offsets, (-1, 2)).T  # characters of each token, half open
                in_spans = [(begins < end) & (begin < ends) for begin, end in row_spans]
                is_learnt = np.any(in_spans, axis=0)
                yield ids, np.where(is_learnt, ids, IGNORE_INDEX).tolist()

    def render(self, chat: Chat) -> str:
        """Returns the text of a conversation."""
        if not chat.messages:
            return ""
        text, _ = self._render(chat, len(chat.messages))
        return text

    def last_turn(self, chat: Chat) -> tuple[str, str]:
        """Returns the text before the last span that is learnt, and that span."""
        self.check_roles(chat)
        text, spans = self.mark(chat)
        begin, end = spans[-1] if spans else (len(text), len(text))
        return text[:begin], text[begin:end]

    def mark(self, chat: Chat) -> Marked:
        """Returns the text of a conversation and the spans in it that are learnt.

        Raises:
            UserError: the template refuses the conversation, or its turns cannot be found.
        """
        if not chat.messages:
            return "", []
        template = self._tokenizer.get_chat_template(tools=chat.tools)
        marks_turns = GENERATION.search(template) is not None
        text, spans = self._render(chat, len(chat.messages), mark=marks_turns)
        if spans is not None:
            begin = self._end(chat, chat.context, text) if chat.context else 0
            return text, [span for span in spans if span[0] >= begin]
        return text, self._turns(chat, text)

    def _turns(self, chat: Chat, text: str) -> list[Span]:
        """Finds the assistant's turns in the complete `text` by rendering the messages before and up to each."""
        first = max(1, chat.context)  # a first message has no prompt
        roles = [message["role"] for message in chat.messages]
        turns = [i for i in range(first, len(roles)) if roles[i] == "assistant"]
        spans: list[Span] = []
        for i in turns:  # some templates change earlier answers. Qwen3's drops their thinking
            with nullcontext() if i == turns[-1] else suppress(NotAPrefix):
                begin = self._end(chat, i, text, prompt=True)
                spans.append((begin, self._end(chat, i + 1, text)))
        return spans

    def _end(self, chat: Chat, count: int, text: str, *, prompt: bool = False) -> int:
        """Returns where the first `count` messages end in the complete `text`. Raises NotAPrefix."""
        if count == len(chat.messages):
            return len(text)
        prefix, _ = self._render(chat, count, prompt=prompt)
        if text.startswith(prefix):
            return len(prefix)
        if prompt and text.startswith(self._render(chat, count)[0]):
            # The prompt begins a thought, but this answer has none.
            pairs = enumerate(zip(text, prefix, strict=False))
            return next((i for i, (a, b) in pairs if a != b), len(text))
        raise NotAPrefix(
            f"data.format chat: the chat template of {self.name} has no {{% generation %}}, and its first {count} "
            f"of {len(chat.messages)} messages alone become {prefix[-60:]!r}, which the whole does not have there; "
            "mark the assistant's turns in chat_template.jinja"
        )

    def _render(
        self, chat: Chat, count: int, *, prompt: bool = False, mark: bool = False
    ) -> tuple[str, list[Span] | None]:
        """Renders the first `count` messages. With `mark` the template returns the assistant's spans."""
        messages = chat.messages[:count]
        special_tokens: Any = self._tokenizer.special_tokens_map
        with rendering("data.format chat", self.name, messages):
            rendered: Any = render_jinja_template(
                [messages],
                tools=chat.tools,
                chat_template=self._tokenizer.get_chat_template(tools=chat.tools),
                return_assistant_tokens_mask=mark,
                add_generation_prompt=prompt,
                **special_tokens,
            )
        texts, spans = rendered
        return texts[0], spans[0] if mark else None
