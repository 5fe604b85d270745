"""Files are read as they are, and data sets are joined to the text of their raw files."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from loraprune_ds.cli.evaluate import read_evaluation_text
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.evaluation_text import load_dataset_text, read_text


def test_a_file_is_one_text_whatever_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes("one\n\ntwo é\n".encode())
    (tmp_path / "windows.raw").write_bytes(b"\xef\xbb\xbf" + "one\r\n\r\ntwo é\r\n".encode())
    unix, windows = read_text(tmp_path / "unix.txt"), read_text(tmp_path / "windows.raw")
    assert unix.text == windows.text == "one\n\ntwo é\n"
    assert unix.sha256 == windows.sha256
    assert (unix.name, unix.split) == ("unix.txt", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b"caf\xe9", "is not UTF-8 text: byte 3 is wrong")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(path)
    assert str(caught.value) == f"--text: {path} {message}"


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands for `datasets.load_dataset`. Holds what it is asked for and the rows it returns."""
    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, *, revision: str | None, split: str) -> Any:
        asked.update(path=path, name=name, revision=revision, split=split)
        return asked["rows"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_wikitext_is_joined_as_its_raw_file_has_it(hub: dict[str, Any]) -> None:
    """Its rows keep their line ends. A blank line is a space in the raw file, but an empty row."""
    hub["rows"] = {"text": ["", " = Title = \n", "", " A sentence . \n", " Another . \n", ""]}
    found = load_dataset_text("wikitext2", "validation")
    assert found.text == " \n = Title = \n \n A sentence . \n Another . \n \n"
    assert (hub["path"], hub["name"], hub["split"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")
    assert (found.name, found.split) == ("wikitext2", "validation")


def test_ptb_is_joined_as_its_raw_file_has_it(hub: dict[str, Any]) -> None:
    hub["rows"] = {"sentence": ["no it was n't black monday", "but while <unk>"]}
    assert load_dataset_text("ptb", "test").text == " no it was n't black monday \n but while <unk> \n"
    assert (hub["path"], hub["split"]) == ("ptb-text-only/ptb_text_only", "test")


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError) as caught:
        load_dataset_text("wikitext2", "test")
    line = str(caught.value)
    assert line.startswith("--dataset wikitext2: Salesforce/wikitext, split test, cannot be had")
    assert "--text FILE" in line
    assert "Couldn't reach the Hub (offline)" in line


@pytest.mark.parametrize("option", ["split", "sliding", "max_windows"])
def test_what_says_how_to_read_a_text_needs_one(option: str) -> None:
    """Beside tasks or speed no text is read, unless one is named."""
    given = {"text": None, "dataset": None, "split": None, "sliding": None, "max_windows": None}
    arguments: Any = SimpleNamespace(**given, tasks=["piqa"], speed=False, serve=None)
    assert read_evaluation_text(arguments) is None
    setattr(arguments, option, 3)
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} has no effect without --dataset or --text"):
        read_evaluation_text(arguments)
