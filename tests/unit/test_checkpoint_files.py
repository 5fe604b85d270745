"""Folders and files that appear whole, in one rename or once for a node, whatever a killed process left."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from loraprune_ds import files
from loraprune_ds.checkpoint import layout, save
from loraprune_ds.checkpoint.load import open_checkpoint, source_digest
from loraprune_ds.checkpoint.save import drop_old
from loraprune_ds.checkpoint.state import Origin, RunData, State, Totals, read_state
from loraprune_ds.errors import UserError
from loraprune_ds.files import (
    MANIFEST,
    STATE_FILE,
    begin_folder,
    json_text,
    make_once,
    publish_folder,
    remove_folder,
)
from loraprune_ds.pretrained import weight_files
from loraprune_ds.pretrained.weight_files import read_samples
from loraprune_ds.ranks.comm import Communicator
from tests.oracle.models import make_tiny_llama
from tests.support.refusals import Spoil, edit, edit_tensors, flip_bit, merge_into, must_name


def make_state(step: int, **changes: Any) -> State:
    state = State(
        step=step,
        origin=Origin(
            config={"seed": 0},
            steps=9,
            seed=0,
            query_heads=False,
            folder="/models/source",
            digest="abc",
            groups=[[3, 5]],
            data=RunData("a", "b", {"data": "c"}),
        ),
        kept=[[[0, 2], [1, 3, 4]]],
        engine="zero3",
        world_size=2,
        scaling=2.0,
        scalings={"0.mlp.down_proj": 1.0},
        formats={},
        trained=[],
        asked=0.5,
        totals=Totals(1536 * step, 22.5, None),
        resumed_from=[3],
        accelerator="cpu",
        peak_bytes=[1, 2],
    )
    return replace(state, **changes)


def make_step(root: Path, step: int, **changes: Any) -> Path:
    target = layout.step_folder(root, step)
    staging = begin_folder(target)
    (staging / STATE_FILE).write_text(json_text(make_state(step, **changes)))
    layout.write_manifest(staging, {STATE_FILE: layout.seal(staging / STATE_FILE)})
    resume = staging / layout.RESUME_FOLDER
    resume.mkdir()
    (resume / STATE_FILE).touch()
    publish_folder(target)
    return target


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "ours"),
    [
        ("manifest.json", "{}", True),
        ("state.json", "{}", True),
        ("README.md", "Made\nwith loraprune_ds.", True),
        ("README.md", "my dense model", False),
        ("config.json", "{}", False),
    ],
)
def test_only_a_folder_that_the_package_made_is_removed(
    tmp_path: Path, name: str, text: str, ours: bool
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_text(text)
    if ours:
        files.remove_folder(folder)
    else:
        must_name(f"{folder} loraprune_ds", files.remove_folder, folder)
    assert folder.exists() != ours


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


def test_files_are_on_the_disk_before_anything_relies_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").resolve().name)
    )
    make_step(tmp_path, 4)
    assert synced == [STATE_FILE, MANIFEST, ".step-4.partial", tmp_path.name]
    del synced[:]
    with save.Staging(Communicator(), tmp_path / "step-5", "step") as staging:
        staging.write("resume/state.json", lambda path: path.write_text("{}"))
        staging.publish()
    in_resume = [STATE_FILE, MANIFEST, layout.RESUME_FOLDER]
    assert [name for name in synced if "partial" not in name] == [*in_resume, tmp_path.name]


def test_a_save_that_fails_leaves_no_half_on_a_disk_that_may_be_full(tmp_path: Path) -> None:
    def fail() -> None:
        with save.Staging(Communicator(), tmp_path / "step-5", "step") as staging:
            staging.write("state.json", lambda path: path.write_text("{}"))
            raise UserError("layer 1 cannot be gathered")

    must_name("layer 1", fail)
    assert names(tmp_path) == []


def test_removal_is_all_or_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = make_step(tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            remove_folder(step)
    assert layout.numbered(tmp_path, "step") == []
    remove_folder(make_step(tmp_path, 4))
    assert names(tmp_path) == []


def test_what_cannot_be_removed_yet_ends_no_run_and_goes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS keeps files that another process still reads."""
    make_step(tmp_path, 4)
    make_step(tmp_path, 8)
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
        (Path.unlink, MANIFEST, "missing"),
        (partial(flip_bit, at=0), MANIFEST, "damaged"),
        (lambda path: path.write_text('{"files": {"a": 3}}'), MANIFEST, "damaged"),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_damage_is_named(
    tmp_path: Path, damage: Callable[[Path], object], name: str, word: str, parts: int
) -> None:
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
    assert all(
        str(tmp_path / "step-1" / name) in line and word in line and "\n" not in line
        for line in lines
    )


@pytest.mark.parametrize(
    ("saved", "keep_last", "left"),
    [
        (16, 3, [8, 12, 16]),
        (16, 2, [12, 16]),
        (8, 2, [4, 8]),  # after a resume from an older one
        (8, 1, [8]),
    ],
)
def test_old_steps_go(tmp_path: Path, saved: int, keep_last: int, left: list[int]) -> None:
    for step in (4, 8, 12, 16):
        make_step(tmp_path, step)
    # of killed processes
    for name in (".step-8.partial", ".step-2.removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-x").mkdir()  # no number
    (tmp_path / "step-7").write_text("a file")
    drop_old(tmp_path, saved, keep_last=keep_last)
    assert layout.numbered(tmp_path, "step") == left
    assert not any(name.startswith(".") for name in names(tmp_path))
    for step in left:
        layout.verify(tmp_path / f"step-{step}")
        assert (tmp_path / f"step-{step}" / layout.RESUME_FOLDER).is_dir()


STATE = json.loads(json_text(make_state(7)))
CHANGES: list[tuple[dict[str, object], str]] = [
    *(
        ({"format": other}, f"has format {other}")
        for other in (layout.FORMAT + 1, layout.FORMAT - 1)
    ),
    ({"format": None}, "damaged"),
    ({"surprise": 1}, "surprise"),
    ({"kept": 3}, "damaged"),
    ({"step": "7"}, "step"),
    ({"engine": {}}, "engine"),
    ({"engine": "fsdp3"}, "fsdp3 later"),
]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *((content, "damaged") for content in (b"", b"\xff\xfe\x00", b'{"step": 7', b"[]")),
        *((json.dumps(STATE | change).encode(), words) for change, words in CHANGES),
    ],
)
def test_the_state_is_read_or_refused_in_one_line(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / STATE_FILE
    file.write_text(json_text(make_state(7)))
    assert read_state(tmp_path) == make_state(7)
    file.write_bytes(content)
    must_name(f"{file} {words}", read_state, tmp_path)


# The source of a step


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a model whose head and embedding come first in its file, and fill more than a MiB."""
    return make_tiny_llama(
        tmp_path_factory.mktemp("large"), vocab=20_000, ffn=20_000, dtype="bfloat16"
    )


def set_value(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][0] += 1


@pytest.mark.parametrize(
    "change",
    [
        merge_into("model.layers.1.mlp.down_proj.weight"),
        merge_into("model.layers.1.self_attn.k_proj.weight"),
        edit_tensors(set_value),
        edit("config.json", rope_theta=7.0),
    ],
)
def test_a_source_that_changed_in_place_is_refused(
    tmp_path: Path, large: Path, change: Spoil
) -> None:
    source = tmp_path / "source"
    shutil.copytree(large, source)
    origin = replace(
        make_state(1).origin,
        folder=str(source),
        digest=source_digest(source),
        config={"output_dir": str(tmp_path)},
    )
    step = make_step(tmp_path, 1, origin=origin)
    open_checkpoint(step, Communicator(), dense=Mock())
    change(source)
    must_name(f"{source} source {step}", open_checkpoint, step, Communicator(), dense=Mock())
    without = make_step(tmp_path, 2, origin=replace(origin, folder=None))
    must_name(f"{without} dense save_model", open_checkpoint, without, Communicator())


def test_samples_are_at_fixed_places_in_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "PER_SAMPLE", 50)
    monkeypatch.setattr(weight_files, "SAMPLE", 8)
    path = tmp_path / "model.safetensors"
    sizes = {"large": 100, "none": 0, "small": 3}
    save_file(
        {name: torch.arange(size, dtype=torch.uint8) for name, size in sizes.items()},
        path,
        {"format": "pt"},
    )
    header, *samples = read_samples(path)
    assert [*json.loads(header)] == ["__metadata__", *sizes]
    assert [[*sample] for sample in samples] == [[*range(21, 29)], [*range(71, 79)], [], [0, 1, 2]]


def test_device_memory_is_given_back_before_the_ranks_gather(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
    for wrong in ({"state": "walking"}, {"mark": None}):
        layout.write_status(tmp_path, status)
        edit("status.json", **wrong)(tmp_path)
        must_name(f"{tmp_path / 'status.json'} {next(iter(wrong))}", layout.read_status, tmp_path)


# What is made once for a node, also where its file system has no locks


def fill(folder: Path) -> None:
    (folder / "file").write_text("whole")


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(code, "no lock")))


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_locks_the_first_that_makes_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    refuse(monkeypatch, code)

    def slower(folder: Path) -> None:
        make_once(tmp_path / "made", fill)
        (folder / "file").write_text("later")

    make_once(tmp_path / "made", slower)
    make_once(tmp_path / "made", lambda folder: pytest.fail("it is there already"))
    assert (tmp_path / "made" / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_another_error_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="no lock"):
        make_once(tmp_path / "made", fill)
