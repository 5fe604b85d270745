"""Settings of an evaluation. They import fast, so wrong options are reported before torch is imported."""

import difflib
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.generate.prompts import AnswerSettings


@dataclass(frozen=True)
class EvaluationText:
    """A text and its source: a file, or a split of a data set."""

    name: str
    split: str | None
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


class Dataset(NamedTuple):
    """Locates a data set, and makes the text of its raw file from its rows."""

    options: dict[str, str]  # of `datasets.load_dataset`
    column: str
    raw_line: Callable[[str], str]  # the line of a row, with its end


DATASETS = {
    # Rows keep spaces and line ends. Only blank lines, " \n" in wiki.*.raw, are empty rows.
    "wikitext2": Dataset(
        {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        "text",
        lambda row: row or " \n",
    ),
    # `datasets` no longer runs the published script. The hub keeps the script's output on this branch.
    # ptb.*.txt has a space before and after every sentence, which the rows lack.
    "ptb": Dataset(
        {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet"},
        "sentence",
        lambda row: f" {row} \n",
    ),
}


def load_dataset_text(name: str, split: str) -> EvaluationText:
    """Loads a data set of `DATASETS` by name and joins its rows to the text of its raw file."""
    import datasets

    dataset = DATASETS[name]
    load: Any = datasets.load_dataset
    datasets.disable_progress_bars()
    try:
        rows = load(**dataset.options, split=split)
    except Exception as error:  # noqa: BLE001  # `datasets` passes on the errors of four libraries
        raise UserError(
            f"--dataset {name}: {dataset.options['path']}, split {split}, cannot be loaded "
            f"(offline? then --text FILE): {one_line(error)}"
        ) from None
    lines = map(dataset.raw_line, rows[dataset.column])
    return EvaluationText(name, split, "".join(lines))


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
    """Returns the end of an error line, which names similar tasks. Empty without similar ones."""
    similar = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(similar)}?" if similar else ""


@dataclass(frozen=True)
class EvaluationSettings:
    """Selects what to measure. Text, tasks and answers are not measured if they are None."""

    window: int = 128  # tokens of the adjacent windows for perplexity
    max_windows: int | None = None
    text: EvaluationText | None = None
    dtype: str | None = None  # None: each model's own
    # windows, or requests of a task, per pass and rank. None: about TOKENS_PER_BATCH
    batch_size: int | None = None
    tasks: TaskSettings | None = None
    answers: AnswerSettings | None = None
    sharded: bool = False  # ZeRO-3 shards the weights, for models that fit no single device

    def __post_init__(self) -> None:
        if self.sharded and (self.tasks or self.answers):
            raise UserError(
                "--sharded measures perplexity only; --tasks and --answers need the whole model"
            )

    @property
    def actual_batch_size(self) -> int:
        """Returns `batch_size` or its default."""
        return self.batch_size or max(1, TOKENS_PER_BATCH // self.window)
