"""Texts, tasks and settings: files are read unchanged, data sets are joined to raw files, wrong options are refused."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, Mock

import datasets
import pytest

from loraprune_ds.cli.evaluate import parse_arguments, read_evaluation_text
from loraprune_ds.evaluate import settings, tasks
from loraprune_ds.evaluate.settings import EvaluationSettings, TaskSettings
from loraprune_ds.evaluate.tasks import PAPER_TASKS, check_tasks
from loraprune_ds.files import read_text
from tests.support.refusals import must_name

TASK = "task: my_own\ndataset_path: json\noutput_type: multiple_choice\n"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


# Texts


def test_a_file_is_one_text_whatever_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "unix.txt").write_bytes("one\n\ntwo é\n".encode())
    (tmp_path / "windows.raw").write_bytes(b"\xef\xbb\xbf" + "one\r\n\r\ntwo é\r\n".encode())
    assert {read_text(tmp_path / name, "--text") for name in ("unix.txt", "windows.raw")} == {
        "one\n\ntwo é\n"
    }


@pytest.mark.parametrize("name", ["no.txt", "empty.txt", "latin.txt", ""])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    must_name(f"--text {tmp_path / name}", read_text, tmp_path / name, "--text")


def test_a_file_that_may_not_be_read_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # root may read all
    monkeypatch.setattr(Path, "open", Mock(side_effect=PermissionError(13, "Permission denied")))
    must_name("--text a.txt denied", read_text, Path("a.txt"), "--text")


@pytest.mark.parametrize(
    ("name", "column", "rows", "text", "asked"),
    [
        (  # rows keep their line ends. A blank line is a space in the raw file, but an empty row
            "wikitext2",
            "text",
            ["", " = Title = \n", "", " A sentence . \n", " Another . \n", ""],
            " \n = Title = \n \n A sentence . \n Another . \n \n",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
        ),
        (
            "ptb",
            "sentence",
            ["no it was n't black monday", "but while <unk>"],
            " no it was n't black monday \n but while <unk> \n",
            {"path": "ptb-text-only/ptb_text_only", "revision": ANY},
        ),
    ],
)
def test_a_data_set_is_joined_to_its_raw_file(
    name: str, column: str, rows: list[str], text: str, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", load_dataset := Mock(return_value={column: rows}))
    found = settings.load_dataset_text(name, "validation")
    assert (found.text, found.name, found.split) == (text, name, "validation")
    load_dataset.assert_called_once_with(**asked, split="validation")


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    offline = ConnectionError("Couldn't reach the Hub\n(offline)")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=offline))
    must_name(
        "--dataset wikitext2 --text (offline)", settings.load_dataset_text, "wikitext2", "test"
    )


@pytest.mark.parametrize("option", ["split", "max_windows"])
def test_options_of_a_text_need_one(option: str) -> None:
    """No text is read if tasks or speed are measured, unless one is named."""
    given = {"text": None, "dataset": None, "split": None, "max_windows": None}
    arguments: Any = SimpleNamespace(**given, tasks=["piqa"])
    assert read_evaluation_text(arguments) is None
    setattr(arguments, option, 3)
    must_name(f"--{option.replace('_', '-')} --dataset --text", read_evaluation_text, arguments)


# Tasks


@needs_lm_eval
def test_tasks_of_the_paper_and_local_ones_are_found(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK)
    found = tasks._split(TaskSettings(("lambada", "paper", "boolq")))
    assert found == ([], ["lambada", *PAPER_TASKS])
    assert len(PAPER_TASKS) == 7
    for names in (("paper", "boolq"), ("my_own",), (str(tmp_path / "mine.yaml"),)):
        # always the same, whose index takes seconds
        check_tasks(TaskSettings(names, include_path=tmp_path))
    must_name(
        "--include-path nowhere",
        check_tasks,
        TaskSettings(("my_own",), include_path=tmp_path / "nowhere"),
    )
    must_name(
        "--tasks helaswag hellaswag",
        check_tasks,
        TaskSettings(("helaswag",), include_path=tmp_path),
    )


# Settings


@pytest.mark.parametrize(
    "given",
    "window 1,window two,max-windows 0,generated 0,num-fewshot -1,limit 0,batch-size 0,max-new-tokens 0".split(
        ","
    ),
)
def test_wrong_numbers_name_their_option(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["evaluate.py", "MODEL", *f"--{given}".split()])
    must_name(given, parse_arguments)


def test_a_sharded_model_has_no_tasks() -> None:
    tasks = TaskSettings(("a",))
    must_name("--sharded --tasks", EvaluationSettings, tasks=tasks, sharded=True)
