"""Resumes and exports what is in tests/kept_steps, which every later commit must read.

Each folder of `steps` is named after the version that wrote it: a run on one rank, killed in its seventh step, and a
checkpoint of the callback after six steps. `expected.json` has what both come to when they go on.
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

from loraprune_ds.checkpoint.load import source_digest
from loraprune_ds.config_file import read_config
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.run import run
from tests.support import kept_trainer, resuming
from tests.support.launching import ROOT
from tests.support.ranks import RankPool
from tests.support.refusals import flip_bit, must_name
from tests.support.trainers import fresh_accelerate

KEPT = ROOT / "tests" / "kept_steps"
TOLERANCE = 1e-4  # of losses, on another processor
RUNS = sorted(path.parent.name for path in KEPT.glob("steps/*/run"))
TRAINERS = sorted(path.parent.name for path in KEPT.glob("steps/*/trainer"))


@pytest.fixture
def expected(folder: Path) -> JsonObject:
    """What the kept trainings come to."""
    return read_json(folder / "expected.json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> Path:
    shutil.copytree(KEPT, tmp_path / "kept", ignore=shutil.ignore_patterns("steps"))
    shutil.copytree(KEPT / "steps" / version, tmp_path / "kept", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "kept")  # its paths are relative
    return tmp_path / "kept"


def resume_in(folder: Path) -> None:
    """Finishes the run."""
    comm = Communicator()
    os.environ["LOCAL_RANK"] = str(comm.rank)
    with contextlib.chdir(folder):
        assert run(OutputFolder(read_config("config.yaml", []), "auto"), comm)


@pytest.mark.parametrize("version", RUNS)
def test_a_step_goes_on_with_another_number_of_ranks_to_the_same_end(
    ranks: RankPool, folder: Path, expected: JsonObject
) -> None:
    ranks.run(2, resume_in, folder)
    out = folder / "run"
    assert resuming.losses(out) == pytest.approx(expected["losses"], abs=TOLERANCE)
    assert read_json(out / "kept_groups.json")["layers"] == expected["kept_groups"]
    report = read_json(out / "report.json")
    assert report["perplexity"] == pytest.approx(expected["perplexity"], rel=TOLERANCE)
    assert report["measured"]["parameters"] == expected["parameters"]


@pytest.mark.parametrize("version", TRAINERS)
def test_a_callbacks_checkpoint_goes_on(folder: Path, expected: JsonObject) -> None:
    with fresh_accelerate():
        trainer, pruning = kept_trainer.train(folder, folder / "trainer")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-2:] == pytest.approx(expected["trainer"]["losses"], abs=TOLERANCE)
    kept = [
        [layer[kind].tolist() for kind in ("heads", "channels")]
        for layer in pruning.pruning.pruner.kept_of_dense
    ]
    assert kept == expected["trainer"]["kept_groups"]
    pruning.save_model(folder / "model")
    assert "# source, pruned" in (folder / "model/README.md").read_text()


@pytest.mark.parametrize("version", RUNS)
def test_a_step_knows_its_source_again(folder: Path, expected: JsonObject, tmp_path: Path) -> None:
    """Its digest may not change."""
    source, step = folder / "source", folder / "run/checkpoints/step-6"
    assert source_digest(source) == expected["source_digest"]
    flip_bit(source / "model.safetensors")
    must_name("source step-6", export, find_contents(step), "hf", tmp_path / "model")


@pytest.mark.parametrize("version", RUNS)
@pytest.mark.parametrize("form", ["hf", "adapter"])
def test_a_step_is_exported(folder: Path, expected: JsonObject, tmp_path: Path, form: str) -> None:
    model = tmp_path / "model"
    export(find_contents(folder / "run/checkpoints/step-6"), form, model)
    exported = open_pretrained(model / "base" if form == "adapter" else model)
    assert exported.shape.total_numel() == expected["parameters_at_6"]
