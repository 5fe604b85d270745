"""The text that perplexity is measured on: a file, or a public test set by name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError, one_line


@dataclass(frozen=True)
class EvaluationText:
    """A text and its source: a file, or a split of a data set."""

    name: str
    split: str | None
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TextDataset:
    """A text data set of the Hugging Face hub, with one line in each row."""

    path: str
    config: str | None
    revision: str | None
    column: str
    raw_line: Callable[[str], str]  # a row's text -> the line of the raw file, with its end


DATASETS = {
    # The rows keep spaces and line ends. Only a blank line, " \n" in wiki.*.raw, is an empty row.
    "wikitext2": TextDataset("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text", lambda row: row or " \n"),
    # Published as a script, which `datasets` no longer runs. The hub keeps its output on this branch.
    # ptb.*.txt has a space before and after every sentence. The rows are stripped.
    "ptb": TextDataset(
        "ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "sentence", lambda row: f" {row} \n"
    ),
}


def read_text(path: Path) -> EvaluationText:
    """Reads a UTF-8 file. Line ends of any kind become "\\n"."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--text: {path} does not exist") from None
    except OSError as error:
        raise UserError(f"--text: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text: {path} is not UTF-8 text: byte {error.start} is wrong") from None
    if not text:
        raise UserError(f"--text: {path} is empty")
    return EvaluationText(path.name, None, text)


def load_dataset_text(name: str, split: str) -> EvaluationText:
    """Loads a data set of `DATASETS` by name and joins its rows to the text of its raw file."""
    import datasets

    dataset = DATASETS[name]
    datasets.disable_progress_bars()
    try:
        rows: Any = datasets.load_dataset(dataset.path, dataset.config, revision=dataset.revision, split=split)
    except Exception as error:  # noqa: BLE001  # `datasets` passes on the errors of four libraries
        advice = "cannot be loaded (offline? then --text FILE)"
        raise UserError(f"--dataset {name}: {dataset.path}, split {split}, {advice}: {one_line(error)}") from None
    return EvaluationText(name, split, "".join(dataset.raw_line(row) for row in rows[dataset.column]))
