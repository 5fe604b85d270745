"""Reads prompts from a file. It imports fast, so a wrong option is reported before torch is imported."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_text
from loraprune_ds.versions import check_installed

DEFAULT_PROMPTS = "default"
PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")
Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """A question to a model, with notes for readers of the answer. `row` counts the lines of the file from 1."""

    row: int
    messages: list[Message]  # the last one is the user's
    kind: str | None = None  # a word such as chat or code
    expected: str | None = None
    target: str | None = None  # the one right answer


@dataclass(frozen=True)
class AnswerSettings:
    """Each prompt is answered greedily, and by sampling with these values. The names are Hugging Face's."""

    name: str
    sha256: str  # of the file's text
    prompts: tuple[Prompt, ...]
    max_new_tokens: int = 128
    temperature: float = 0.7
    top_k: int = 50
    seed: int = 0

    @property
    def targets(self) -> list[str]:
        """Returns the right answer to every prompt. Empty if there are none."""
        return [prompt.target for prompt in self.prompts if prompt.target is not None]

    def __post_init__(self) -> None:
        count = len(self.targets)
        require(
            count in (0, len(self.prompts)),
            f"--answers: {self.name} has {count} targets; give each row one, or none",
        )
        if count:
            check_installed("rouge_score", "--answers with targets", "rouge-score")


def read_prompts(name: str, option: str = "--answers", **settings: Any) -> AnswerSettings:
    """Reads the file `name`, or the shipped prompts if the name is `default`. An error names option, file and row."""
    path = PROMPTS_FILE if name == DEFAULT_PROMPTS else Path(name)
    text = read_text(path, option)
    prompts: list[Prompt] = []
    # other ends of lines may stand within a JSON text
    for row, line in enumerate(text.split("\n"), 1):
        if line.strip():
            prompts.append(_read_row(f"{option}: {path}, row {row}", row, line))
    name = name if name == DEFAULT_PROMPTS else path.name
    digest = hashlib.sha256(text.encode()).hexdigest()
    return AnswerSettings(name, digest, tuple(prompts), **settings)


def _read_row(where: str, row: int, line: str) -> Prompt:
    try:
        value = from_json(line)
    except ValueError as error:
        raise UserError(
            f'{where}: not JSON, {error}; a row is like {{"prompt": "2 + 3?"}}'
        ) from None
    value: Any = value if isinstance(value, dict) else {}
    prompt = value.get("prompt", value.get("source"))  # the second as in data.format seq2seq
    require(prompt is not None, f"{where}: not an object with the key prompt")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    require(
        isinstance(messages, list) and bool(messages) and all(map(_is_message, messages)),
        f"{where}: prompt must be a text, or a list of messages with role and content; neither may be empty",
    )
    require(messages[-1]["role"] == "user", f"{where}: the last message must be the user's")
    notes = {key: value.get(key) for key in ("kind", "expected", "target")}
    for key, note in notes.items():
        require(
            note is None or isinstance(note, str),
            f"{where}: {key} must be a text; got {note!r:.80}",
        )
    return Prompt(row, messages, **notes)


def _is_message(value: Any) -> bool:
    parts = [value.get("role"), value.get("content")] if isinstance(value, dict) else [None]
    return all(isinstance(part, str) and part.strip() for part in parts)
