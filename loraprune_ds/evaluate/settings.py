"""Settings of an evaluation. They import fast, so wrong options are reported before torch is imported."""

import difflib
import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import read_text

DEFAULT_PROMPTS = "default"
PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")
Message = dict[str, str]


@dataclass(frozen=True)
class EvaluationText:
    """A text and its source: a file, or a split of a data set."""

    name: str
    split: str | None
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


# By name: how to load the rows, their column, and the line of the raw file that a row is, with its end.
DATASETS: dict[str, tuple[dict[str, Any], str, Callable[[str], str]]] = {
    # Rows keep spaces and line ends. Only blank lines, " \n" in wiki.*.raw, are empty rows.
    "wikitext2": (
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        "text",
        lambda row: row or " \n",
    ),
    # `datasets` no longer runs the published script. The hub keeps the script's output on this branch.
    # ptb.*.txt has a space before and after every sentence, which the rows lack.
    "ptb": (
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        "sentence",
        lambda row: f" {row} \n",
    ),
}


def load_dataset_text(name: str, split: str) -> EvaluationText:
    """Loads a data set of `DATASETS` by name and joins its rows to the text of its raw file."""
    import datasets

    options, column, raw_line = DATASETS[name]
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(**options, split=split)
    except Exception as error:  # noqa: BLE001  # `datasets` passes on the errors of four libraries
        advice = "cannot be loaded (offline? then --text FILE)"
        raise UserError(
            f"--dataset {name}: {options['path']}, split {split}, {advice}: {one_line(error)}"
        ) from None
    return EvaluationText(name, split, "".join(map(raw_line, rows[column])))


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
        some = f"--answers: {self.name} has {count} targets; give each row one, or none"
        require(count in (0, len(self.prompts)), some)
        installed = importlib.util.find_spec("rouge_score") is not None
        require(
            not count or installed,
            "--answers with targets needs the package rouge-score: pip install rouge-score",
        )


def read_prompts(name: str, option: str = "--answers", **settings: Any) -> AnswerSettings:
    """Reads the file `name`, or the shipped prompts if the name is `default`. An error names option, file and row."""
    path = PROMPTS_FILE if name == DEFAULT_PROMPTS else Path(name)
    text = read_text(path, option)
    lines = enumerate(text.split("\n"), 1)  # other ends of lines may stand within a JSON text
    prompts = tuple(
        _read_row(f"{option}: {path}, row {i}", i, line) for i, line in lines if line.strip()
    )
    name = name if name == DEFAULT_PROMPTS else path.name
    return AnswerSettings(name, hashlib.sha256(text.encode()).hexdigest(), prompts, **settings)


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
    notes = {key: value.get(key) for key in ("kind", "expected", "target")}
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    wrong = f"{where}: prompt must be a text, or a list of messages with role and content; neither may be empty"
    require(
        isinstance(messages, list) and bool(messages) and all(map(_is_message, messages)), wrong
    )
    require(messages[-1]["role"] == "user", f"{where}: the last message must be the user's")
    for key, note in notes.items():
        require(
            note is None or isinstance(note, str),
            f"{where}: {key} must be a text; got {note!r:.80}",
        )
    return Prompt(row, messages, **notes)


def _is_message(value: Any) -> bool:
    parts = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None,)
    return all(isinstance(part, str) and part.strip() for part in parts)


# prefix of its tasks, as in reasoning_gym:chain_sum. The prefix alone is a default set
GYM = "reasoning_gym"
# the default: enough work for one pass, and logits of some hundred megabytes
TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class TaskSettings:
    """The tasks, from lm-eval or reasoning-gym."""

    # tasks, groups or tags from lm-eval or `include_path`, paths of task files, `paper`, `GYM` or `GYM`:task
    names: tuple[str, ...]
    include_path: Path | None = None
    # None: the default of each task, 0 for the paper's seven and 3 for reasoning-gym
    fewshot: int | None = None
    limit: int | None = None  # documents per task, for trials


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error line, which names similar tasks. Empty if there are none."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""


@dataclass(frozen=True)
class SpeedSettings:
    """A round of `prompt` random tokens and `generated` greedy ones. `rounds` follow a warm-up."""

    prompt: int = 512
    generated: int = 32
    rounds: int = 5


@dataclass(frozen=True)
class EvaluationSettings:
    """Selects what to measure. Text, tasks, answers and speed are not measured if they are None."""

    window: int = 128  # tokens of the adjacent windows for perplexity
    max_windows: int | None = None
    text: EvaluationText | None = None
    dtype: str | None = None  # None: each model's own
    # windows, or requests of a task, per pass and rank. None: about TOKENS_PER_BATCH
    batch_size: int | None = None
    tasks: TaskSettings | None = None
    answers: AnswerSettings | None = None
    speed: SpeedSettings | None = None
    sharded: bool = False  # ZeRO-3 shards the weights, for models that fit no single device

    def __post_init__(self) -> None:
        if self.sharded and (self.tasks or self.answers or self.speed):
            raise UserError(
                "--sharded measures perplexity only; --tasks, --answers and --speed need the whole model"
            )

    @property
    def actual_batch_size(self) -> int:
        """Returns `batch_size` or its default."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // self.window)
