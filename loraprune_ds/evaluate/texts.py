"""The text a perplexity is measured on: a file, or a public test set by name, as its raw file has it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError, one_line


@dataclass(frozen=True)
class EvaluationText:
    """A text, where it comes from and, for a data set, which part of it this is."""

    name: str
    split: str | None
    text: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class DatasetSource:
    """A text data set of the Hugging Face hub, one line a row.

    Attributes:
        line: a row's text -> the line of the raw file, with its end.
    """

    path: str
    config: str | None
    revision: str | None
    column: str
    line: Callable[[str], str]


DATASETS = {
    # The rows keep spaces and line ends, except that a blank line, " \n" in wiki.*.raw, is an empty row.
    "wikitext2": DatasetSource("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text", lambda row: row or " \n"),
    # `datasets` no longer runs the script this set is published as; the hub keeps its output on that branch.
    # ptb.*.txt has a space before and after every sentence; the rows are stripped.
    "ptb": DatasetSource(
        "ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "sentence", lambda row: f" {row} \n"
    ),
}


def read_text(path: Path) -> EvaluationText:
    """A UTF-8 file, whatever its line ends, which become "\\n".

    Raises:
        UserError: it does not exist, is not text, or is empty.
    """
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
    """A data set of `DATASETS` by name, its lines joined as its raw file has them.

    Raises:
        UserError: it is not on this machine and the hub cannot be reached.
    """
    source = DATASETS[name]
    rows = _load_rows(name, source, split)
    return EvaluationText(name, split, "".join(source.line(row) for row in rows[source.column]))


def _load_rows(name: str, source: DatasetSource, split: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.path, source.config, revision=source.revision, split=split)
    except Exception as error:  # noqa: BLE001  # `datasets` lets the errors of four libraries through
        reason = one_line(error)
        raise UserError(
            f"--dataset {name}: {source.path}, split {split}, cannot be had (offline? then --text FILE): {reason}"
        ) from None
