"""Prompts for `--answers`: a JSONL file, or the 50 of this package. Reading them is fast, as all settings are."""

import hashlib
from codecs import BOM_UTF8
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from loraprune_ds.errors import UserError, require

DEFAULT = "default"
DEFAULT_FILE = Path(__file__).with_name("prompts.jsonl")
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A question to a model, and what helps a reader to judge the answer. `row` counts the file's lines from 1."""

    row: int
    messages: list[Message]  # the last one is the user's
    kind: str | None = None  # a word such as chat or code
    expected: str | None = None

    @property
    def text(self) -> str:
        """Returns the messages as plain text, for a model without a chat template."""
        return "\n\n".join(message["content"] for message in self.messages)


@dataclass(frozen=True)
class AnswerSettings:
    """Each prompt is answered twice: greedily, and by sampling with these values. The names are Hugging Face's."""

    name: str
    sha256: str  # of the file
    prompts: tuple[Prompt, ...]
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, f"--max-new-tokens must be at least 1; got {self.max_new_tokens}")


def read_prompts(name: str, **settings: Any) -> AnswerSettings:
    """Reads the file `name`, or the shipped prompts if the name is `default`. An error names the file and the row."""
    path = DEFAULT_FILE if name == DEFAULT else Path(name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"--answers: {path} cannot be read: {error.strerror}") from None
    rows = [(f"--answers: {path}, row {i}", i, line) for i, line in enumerate(data.splitlines(), 1) if line.strip()]
    require(bool(rows), f"--answers: {path} is empty")
    prompts = tuple(_read_row(*row) for row in rows)
    return AnswerSettings(name if name == DEFAULT else path.name, hashlib.sha256(data).hexdigest(), prompts, **settings)


def _read_row(where: str, row: int, line: bytes) -> Prompt:
    try:
        value = from_json(line.removeprefix(BOM_UTF8))
    except ValueError as error:
        raise UserError(f'{where}: not JSON, {error}; a row is like {{"prompt": "2 + 3?"}}') from None
    require(isinstance(value, dict) and "prompt" in value, f"{where}: not an object with the key prompt")
    prompt, notes = value["prompt"], {key: value.get(key) for key in ("kind", "expected")}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    require(
        isinstance(messages, list) and bool(messages) and all(map(_is_message, messages)),
        f"{where}: prompt must be a text, or a list of messages with role and content; neither may be empty",
    )
    require(messages[-1]["role"] == "user", f"{where}: the last message must be the user's, which a model answers")
    for key, note in notes.items():
        require(note is None or isinstance(note, str), f"{where}: {key} must be a text; got {note!r:.80}")
    return Prompt(row, messages, **notes)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) and value[key].strip() for key in ("role", "content")
    )
