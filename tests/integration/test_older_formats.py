"""Resumes and exports what is in tests/older_formats, which every later commit must read.

Each folder of `steps` is named after the commit that wrote it: a run on one rank, killed in its seventh step, and a
checkpoint of the callback after six steps. `expected.json` has what both come to when they go on. Formats 7 and 8 hold
no inputs of passes, so the next refit has those of one step. Format 9 is today's.
"""

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from loraprune_ds import config_file
from loraprune_ds.checkpoint.layout import seal, write_manifest
from loraprune_ds.checkpoint.load import source_digest
from loraprune_ds.config_file import read_config
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import MANIFEST, STATE_FILE, JsonObject, read_json, write_json
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.run import run
from tests.support import kept_trainer, resuming
from tests.support.families import heavy
from tests.support.launching import ROOT
from tests.support.ranks import RankPool
from tests.support.refusals import flip_bit, must_name
from tests.support.trainers import fresh_accelerate

KEPT = ROOT / "tests" / "older_formats"
TOLERANCE = 1e-4  # of losses, on another processor
RUNS = sorted(path.parent.name for path in KEPT.glob("steps/*/run"))
TRAINERS = sorted(path.parent.name for path in KEPT.glob("steps/*/trainer"))


@pytest.fixture
def expected(folder: Path) -> JsonObject:
    """What the kept trainings come to. A folder of `steps` may have an `expected.json` that replaces the common one."""
    return read_json(folder / "expected.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commit: str) -> Path:
    shutil.copytree(KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("steps"))
    shutil.copytree(KEPT / "steps" / commit, tmp_path / "kept", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "kept")  # its paths are relative
    return tmp_path / "kept"


def resume_in(folder: Path) -> list[str]:
    """Finishes the run. Returns the warnings."""
    comm = Communicator()
    os.environ["LOCAL_RANK"] = str(comm.rank)
    config_file._say_left_out.cache_clear()  # other tests share the process
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("loraprune_ds")
    with contextlib.chdir(folder), patch.object(log, "handlers", [handler]):
        assert run(OutputFolder(read_config("config.yaml", []), "auto"), comm)
    return lines


def change_the_refit(folder: Path) -> None:
    """Gives saved settings other values of the two keys that no longer count."""
    for path in (folder / "run/config.yaml", *folder.rglob(STATE_FILE)):
        text = path.read_text().replace('compensate_steps": 4', 'compensate_steps": 2')
        text = text.replace("compensate_steps: 4", "compensate_steps: 2")
        text = text.replace('compensate_decay": 0.9', 'compensate_decay": 0.5')
        path.write_text(text.replace("compensate_decay: 0.9", "compensate_decay: 0.5"))
        manifest = path.parent / MANIFEST
        if manifest.exists():
            write_manifest(path.parent, read_json(manifest)["files"] | {path.name: seal(path)})


def expected_warnings(folder: Path, *, changed: bool) -> list[str]:
    """Returns a part of each line of rank 0. All steps are cut, so only the first says how few tokens a refit has."""
    names = ["prune.compensate_steps: 2", "prune.compensate_decay: 0.5"] if changed else []
    return names if any(folder.rglob("passes-*.pt")) else [*names, "step 7"]


def assert_warned(lines: list[str], expected: list[str]) -> None:
    assert len(lines) == len(expected)
    assert all(part in line for part, line in zip(expected, lines, strict=True))
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("commit", "changed"), [*((commit, False) for commit in RUNS), heavy(RUNS[0], True)]
)
def test_a_step_goes_on_with_another_number_of_ranks_to_the_same_end(
    ranks: RankPool, folder: Path, expected: JsonObject, changed: bool
) -> None:
    if changed:
        change_the_refit(folder)
    warnings = expected_warnings(folder, changed=changed)
    lines, of_others = ranks.run(2, resume_in, folder)
    assert_warned(lines, warnings)
    assert of_others == []
    out = folder / "run"
    assert resuming.losses(out) == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert read_json(out / "kept_groups.json")["layers"] == expected["kept_groups"]
    report = read_json(out / "report.json")
    assert report["perplexity"] == pytest.approx(expected["perplexity"], rel=TOLERANCE)
    assert report["measured"]["parameters"] == expected["parameters"]


@pytest.mark.parametrize(
    ("commit", "changed"), [*((commit, False) for commit in TRAINERS), (TRAINERS[0], True)]
)
def test_a_callbacks_checkpoint_goes_on(
    folder: Path, expected: JsonObject, changed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if changed:
        change_the_refit(folder)
    config_file._say_left_out.cache_clear()
    warnings = expected_warnings(folder, changed=changed)
    with fresh_accelerate():
        trainer, pruning = kept_trainer.train(folder, folder / "trainer")
    lines = [entry.getMessage() for entry in caplog.records if "loraprune_ds" in entry.name]
    assert_warned(lines, warnings)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-2:] == pytest.approx(expected["trainer"]["losses"], abs=TOLERANCE)
    kept = [
        [layer[kind].tolist() for kind in ("heads", "channels")]
        for layer in pruning.pruning.pruner.kept_of_dense
    ]
    assert kept == expected["trainer"]["kept_groups"]
    pruning.save_model(folder / "model")
    assert "# source, pruned" in (folder / "model/README.md").read_text()


@pytest.mark.parametrize("commit", ["2bcadf3c", "6ec3512a"])  # format 7 does not record it
def test_a_callbacks_checkpoint_without_its_dense_model_is_named(
    folder: Path, tmp_path: Path
) -> None:
    contents = find_contents(folder / "trainer")
    must_name("checkpoint-6 dense save_model", export, contents, "hf", tmp_path / "model")


@pytest.mark.parametrize("commit", ["3483bfff"])
def test_a_step_knows_its_source_again(folder: Path, expected: JsonObject, tmp_path: Path) -> None:
    """By the first MiB of its files. Later steps record `source_digest`, which may not change either."""
    source, step = folder / "source", folder / "run/checkpoints/step-6"
    assert source_digest(source) == expected["source_digest"]
    assert read_json(step / "state.json")["data"]["source"] != expected["source_digest"]
    flip_bit(source / "model.safetensors")
    must_name("source step-6", export, find_contents(step), "hf", tmp_path / "model")


@pytest.mark.parametrize("commit", RUNS)
@pytest.mark.parametrize("form", ["hf", "adapter"])
def test_a_step_is_exported(folder: Path, expected: JsonObject, tmp_path: Path, form: str) -> None:
    model = tmp_path / "model"
    export(find_contents(folder / "run/checkpoints/step-6"), form, model)
    exported = open_pretrained(model / "base" if form == "adapter" else model)
    assert exported.shape.total_numel() == expected["parameters_at_6"]


@pytest.mark.parametrize(
    ("commit", "key", "value", "names"),
    [
        ("2bcadf3c", "model.drop_layers", [1], "model.drop_layers [1] 6ec3512a"),
        ("2bcadf3c", "prune.sizes", ["0.2", "0.4"], "prune.sizes 0.2 0.4 886e65a4"),
        ("76930594", "prune.sizes", ["0.2", "0.4"], "prune.sizes 0.2 0.4 886e65a4"),
    ],
)
def test_a_step_with_a_setting_that_left_names_the_commit_that_reads_it(
    folder: Path, tmp_path: Path, key: str, value: list[Any], names: str
) -> None:
    step = folder / "run/checkpoints/step-6"
    state = read_json(step / STATE_FILE)
    section, name = key.split(".")
    state.get("origin", state)["config"][section][name] = value
    write_json(step / STATE_FILE, state)
    write_manifest(
        step, read_json(step / MANIFEST)["files"] | {STATE_FILE: seal(step / STATE_FILE)}
    )
    must_name(f"{STATE_FILE} {names}", export, find_contents(step), "hf", tmp_path / "model")
