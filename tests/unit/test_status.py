"""status.json is whole at any moment and a damaged one is named."""

import json
from datetime import datetime
from pathlib import Path

import pytest

from loraprune_ds.checkpoint.layout import FORMAT, Status, read_status, write_status
from tests.refusals import refused


def test_status_comes_back_as_it_was(tmp_path: Path) -> None:
    """A reader that opened the file before still reads it whole, because the new text went to another file."""
    assert read_status(tmp_path) is None
    write_status(tmp_path, Status("running", 1, 60))
    status = Status("failed", 12, 60, error="step 12: the loss is NaN")
    with (tmp_path / "status.json").open() as old:
        write_status(tmp_path, status)
        assert json.load(old)["step"] == 1
    assert read_status(tmp_path) == status
    assert datetime.fromisoformat(status.updated).tzinfo is not None
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


GOOD = {"state": "running", "step": 1, "steps": 2, "error": None, "updated": "2026-11-25T01:02:03+00:00"}
GOOD |= {"mark": "a", "job": None, "format": FORMAT}
CHANGES = [{"state": "walking"}, {"state": ["running"]}, {"step": "1"}, {"error": 3}, {"mark": None}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"state": "runn',
        b"[]",
        json.dumps({"state": "running", "step": 1, "steps": 2}).encode(),
        *(json.dumps(GOOD | change).encode() for change in (*CHANGES, {"format": FORMAT - 1})),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    assert str(tmp_path / "status.json") in refused(read_status, tmp_path)
