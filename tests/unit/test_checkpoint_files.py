"""Folders and files that appear whole, in one rename or once for a node, whatever a killed process left."""

import errno
import fcntl
import json
import os
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

from loraprune_ds import files
from loraprune_ds.checkpoint import layout, save
from loraprune_ds.checkpoint.save import drop_old
from loraprune_ds.errors import UserError
from loraprune_ds.files import begin_folder, make_once, publish_folder, remove_folder
from tests.refusals import flip_bit, refused


def make_state(step: int, shape: str) -> layout.RunState:
    return layout.RunState(
        step=step,
        totals=layout.RunTotals(1536 * step, 22.5, None),
        adam_step=step,
        schedule={"last_epoch": step},
        loss_scale={},
        kept=[[[0, 2], [1, 3, 4]]],
        updates_since_cut=1,
        cuts=0,
        shape=layout.ShapeSource(shape, "abc", is_source=not shape.startswith("shape-")),
        resumed_from=[3],
        config={"seed": 0},
        data=layout.RunData(9, "a", "b", {"data": "c"}),
        asked=0.5,
    )


def make_step(root: Path, step: int, shape: str) -> Path:
    target = layout.step_folder(root, step)
    staging = begin_folder(target)
    (staging / layout.STATE_FILE).write_text(layout.state_text(make_state(step, shape)))
    layout.write_manifest(staging, {layout.STATE_FILE: layout.seal(staging / layout.STATE_FILE)})
    publish_folder(target)
    return target


def make_shapes(root: Path, *numbers: int) -> None:
    for number in numbers:
        (root / f"shape-{number}").mkdir(parents=True)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_folder_has_no_name_before_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "step-4"
    (begin_folder(target) / "old").write_text("half")  # of a killed save
    staging = begin_folder(target)
    assert list(staging.iterdir()) == []
    (staging / "a").write_text("1")
    layout.write_manifest(staging, {"a": layout.seal(staging / "a")})
    assert layout.numbered(tmp_path, "step") == []
    assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    publish_folder(target)
    assert names(tmp_path) == ["step-4"]
    layout.verify(target)


def test_files_are_on_the_disk_before_anything_relies_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(files.os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").resolve().name))
    make_step(tmp_path, 4, "shape-1")
    assert synced == [layout.STATE_FILE, layout.MANIFEST, ".step-4.partial", tmp_path.name]


def test_removal_is_all_or_nothing_and_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(tmp_path, 4, "shape-1")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(step)
    assert layout.numbered(tmp_path, "step") == []
    remove_folder(make_step(tmp_path, 4, "shape-1"))
    assert names(tmp_path) == []


def test_what_cannot_be_removed_yet_ends_no_run_and_goes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps files that another process still reads."""
    make_step(tmp_path, 4, "/models/source")
    make_step(tmp_path, 8, "/models/source")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", lambda *_, **__: os.stat("/nowhere"))
        drop_old(tmp_path, 8, keep_last=1)
    assert names(tmp_path) == [".step-4.removed", "step-8"]
    drop_old(tmp_path, 8, keep_last=1)
    assert names(tmp_path) == ["step-8"]


@pytest.mark.parametrize(
    ("damage", "name", "word"),
    [
        (flip_bit, "b", "damaged"),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), "b", "damaged"),
        (Path.unlink, "b", "missing"),
        (Path.unlink, layout.MANIFEST, "missing"),
        (partial(flip_bit, at=0), layout.MANIFEST, "damaged"),
        (lambda path: path.write_text('{"files": {"a": 3}}'), layout.MANIFEST, "damaged"),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], object], name: str, word: str, parts: int) -> None:
    staging = begin_folder(tmp_path / "step-1")
    for file in "abc":
        (staging / file).write_text(file)
    layout.write_manifest(staging, {file: layout.seal(staging / file) for file in "abc"})
    publish_folder(tmp_path / "step-1")
    damage(tmp_path / "step-1" / name)
    lines = []
    for part in range(parts):
        try:
            layout.verify(tmp_path / "step-1", part=part, parts=parts)
        except UserError as error:
            lines.append(str(error))
    assert lines
    assert all(str(tmp_path / "step-1" / name) in line and word in line and "\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("saved", "keep_last", "left"),
    [
        (16, 3, ["shape-0", "shape-1", "step-12", "step-16", "step-8"]),
        (16, 2, ["shape-1", "step-12", "step-16"]),
        (8, 2, ["shape-0", "step-4", "step-8"]),  # after a resume from an older one
    ],
)
def test_old_steps_go_and_shapes_that_none_names(tmp_path: Path, saved: int, keep_last: int, left: list[str]) -> None:
    for number, step in enumerate((4, 8, 12, 16)):
        make_step(tmp_path, step, f"shape-{number // 2}")
    make_shapes(tmp_path, 0, 1, 2)
    for name in (".step-8.partial", ".shape-1.partial", ".step-2.removed"):  # of killed processes
        (tmp_path / name).mkdir()
    (tmp_path / "step-x").mkdir()  # no number
    (tmp_path / "step-7").write_text("a file")
    drop_old(tmp_path, saved, keep_last=keep_last)
    assert [name for name in names(tmp_path) if name not in ("step-x", "step-7")] == left


def test_all_shapes_stay_while_a_damaged_step_may_name_any(tmp_path: Path) -> None:
    (make_step(tmp_path, 4, "shape-0") / layout.STATE_FILE).write_text("{")
    make_step(tmp_path, 8, "shape-1")
    make_shapes(tmp_path, 0, 1)
    drop_old(tmp_path, 8, keep_last=2)
    assert names(tmp_path) == ["shape-0", "shape-1", "step-4", "step-8"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(({"format": other}, f"has format {other}") for other in (layout.FORMAT + 1, layout.FORMAT - 1)),
        ({"format": None}, "missing or damaged"),
        ({"surprise": 1}, "a field is missing or unknown"),
        ({"kept": 3}, "a field is missing or unknown"),
        ({"shape": {}}, "a field is missing or unknown"),
    ],
)
def test_the_state_is_read_or_refused_in_one_line(tmp_path: Path, change: dict[str, object], words: str) -> None:
    state = make_state(7, "shape-2")
    (tmp_path / layout.STATE_FILE).write_text(layout.state_text(state))
    assert layout.read_state(tmp_path) == state
    raw = json.loads(layout.state_text(state)) | change
    (tmp_path / layout.STATE_FILE).write_text(json.dumps(raw))
    message = refused(layout.read_state, tmp_path)
    assert str(tmp_path / layout.STATE_FILE) in message
    assert words in message


def test_device_memory_is_given_back_before_the_ranks_gather(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = Mock()
    calls.comm.configure_mock(rank=0, draw_mark=lambda: "1a2b")
    monkeypatch.setattr(save, "empty_cache", calls.empty_cache)
    save.Staging(calls.comm, tmp_path / "step-1", "step")
    assert [name for name, *_ in calls.method_calls][:2] == ["empty_cache", "comm.all_or_raise"]


# status.json is whole at any moment, and a damaged one is named


def test_status_comes_back_as_it_was(tmp_path: Path) -> None:
    """A reader that opened the file before still reads it whole, because the new text went to another file."""
    assert layout.read_status(tmp_path) is None
    layout.write_status(tmp_path, layout.Status("running", 1, 60))
    status = layout.Status("failed", 12, 60, error="step 12: the loss is NaN")
    with (tmp_path / "status.json").open() as old:
        layout.write_status(tmp_path, status)
        assert json.load(old)["step"] == 1
    assert layout.read_status(tmp_path) == status
    assert datetime.fromisoformat(status.updated).tzinfo is not None
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


GOOD = {"state": "running", "step": 1, "steps": 2, "error": None, "updated": "2026-11-25T01:02:03+00:00"}
GOOD |= {"mark": "a", "job": None, "format": layout.FORMAT}
CHANGES = [{"state": "walking"}, {"state": ["running"]}, {"step": "1"}, {"error": 3}, {"mark": None}]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"state": "runn',
        b"[]",
        json.dumps({"state": "running", "step": 1, "steps": 2}).encode(),
        *(json.dumps(GOOD | change).encode() for change in (*CHANGES, {"format": layout.FORMAT - 1})),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status.json").write_bytes(content)
    assert str(tmp_path / "status.json") in refused(layout.read_status, tmp_path)


# What is made once for a node, also where its file system has no locks


def fill(folder: Path) -> None:
    (folder / "file").write_text("whole")


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, "no lock")))


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
