"""status.json is whole at any moment and a damaged one is named."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from loraprune_ds.checkpoint.layout import FORMAT
from loraprune_ds.checkpoint.run_folder import Status, read_status, write_status
from loraprune_ds.errors import UserError


def test_status_comes_back_as_it_was(tmp_path: Path) -> None:
    status = Status("failed", 12, 60, error="step 12: the loss is NaN")
    write_status(tmp_path / "run", status)
    assert read_status(tmp_path / "run") == status
    assert datetime.fromisoformat(status.updated).tzinfo is not None


def test_a_folder_without_status_has_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None


def test_writing_replaces_the_file_in_one_go(tmp_path: Path) -> None:
    """A reader that opened the old file still reads it whole: the new text went to another file."""
    write_status(tmp_path, Status("running", 1, 60))
    with (tmp_path / "status.json").open() as old:
        write_status(tmp_path, Status("running", 2, 60))
        assert json.load(old)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


GOOD = {"state": "running", "step": 1, "steps": 2, "error": None, "updated": "2026-11-25T01:02:03+00:00"}
GOOD |= {"mark": "a", "job": None, "format": FORMAT}


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"state": "runn',
        "[]",
        json.dumps(GOOD | {"state": "walking"}),
        json.dumps(GOOD | {"state": ["running"]}),
        json.dumps(GOOD | {"step": "1"}),
        json.dumps(GOOD | {"error": 3}),
        json.dumps(GOOD | {"mark": None}),
        json.dumps(GOOD | {"format": FORMAT - 1}),
        json.dumps({"state": "running", "step": 1, "steps": 2}),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_status(tmp_path)
    assert str(tmp_path / "status.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_bytes_that_are_not_text_are_damage_too(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"status\.json is not valid JSON"):
        read_status(tmp_path)
