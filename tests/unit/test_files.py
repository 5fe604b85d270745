"""What is made once for a node, also where its file system has no locks."""

import errno
import fcntl
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.files import make_once


def fill(folder: Path) -> None:
    (folder / "file").write_text("whole")


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, "no lock")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_it_is_made_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refuse(monkeypatch, code)
    make_once(tmp_path / "made", fill)
    make_once(tmp_path / "made", lambda folder: pytest.fail("it is there already"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_of_two_that_make_it_without_a_lock_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENOSYS)

    def slower(folder: Path) -> None:
        make_once(tmp_path / "made", fill)
        (folder / "file").write_text("later")

    make_once(tmp_path / "made", slower)
    assert (tmp_path / "made" / "file").read_text() == "whole"


def test_another_error_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="no lock"):
        make_once(tmp_path / "made", fill)
