"""Compares a run that was stopped and resumed with the run that never stopped, bit by bit at the same world size.

On another number of ranks sums have another order, so the tolerance is that of test_sharded_equals_dense.py.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from loraprune_ds.checkpoint.layout import seal, write_manifest
from loraprune_ds.config import RunConfig
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.support import resuming
from tests.support.families import heavy
from tests.support.launching import read_json
from tests.support.ranks import RankPool
from tests.support.refusals import flip_bit, merge_into, refused
from tests.support.resuming import (
    CUTS,
    STEPS,
    assert_bitwise,
    assert_close,
    assert_same_run,
    contents,
    metrics,
    read_state,
)

NO_SAVES, REFIT = "checkpoint.every=null", "prune.compensate=least_squares"
NO_DROPOUT = ("lora.lora_dropout=0", NO_SAVES)
STOPS = [CUTS[0] - 1, CUTS[1], CUTS[-1] + 1]  # before a cut, at one, and after one


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run on two ranks that was never stopped. It has a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("straight")
    ranks.run(2, resuming.run_here, resuming.config_for(resuming.write_run(folder), folder / "out"))
    return folder / "out"


def variant(ranks: RankPool, straight: Path, name: str, *changes: str) -> Path:
    given, out = straight.parent / "config.yaml", straight.parent / name
    ranks.run(2, resuming.run_here, resuming.config_for(given, out, *changes))
    return out


@pytest.fixture(scope="module")
def refitted(ranks: RankPool, straight: Path) -> Path:
    """Makes a run whose cuts change frozen weights, so that steps hold these."""
    return variant(ranks, straight, "refitted", REFIT)


@pytest.fixture(scope="module")
def no_dropout(ranks: RankPool, straight: Path) -> Path:
    return variant(ranks, straight, "no_dropout", *NO_DROPOUT)


@dataclass(frozen=True)
class Again:
    """Runs the config of the straight run again, in the folder `out`."""

    ranks: RankPool
    straight: Path
    out: Path

    def config(self, *changes: str, out: Path | None = None) -> RunConfig:
        return resuming.config_for(self.straight.parent / "config.yaml", out or self.out, *changes)

    def run(self, config: RunConfig, *arguments: Any, ranks: int = 2) -> list[bool]:
        return self.ranks.run(ranks, resuming.run_here, config, *arguments)

    def find(self, config: RunConfig, resume: str = "auto") -> list[resuming.Found]:
        return self.ranks.run(2, resuming.find_here, config, resume)

    def status(self) -> dict[str, Any]:
        return read_json(self.out / "status.json")

    def files(self) -> dict[Path, bytes]:
        return {
            path: path.read_bytes()
            for path in (self.out / "checkpoints").rglob("*")
            if path.is_file()
        }

    def killed_after(self, step: int, source: Path | None = None) -> Path:
        """Makes the remains of a run killed some time after `step`: its checkpoints, and metrics ahead of them."""
        ignored = shutil.ignore_patterns("model", "report.json", "kept_groups*")
        shutil.copytree(source or self.straight, self.out, ignore=ignored)
        for path in (self.out / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        (self.out / "status.json").write_text(
            json.dumps(self.status() | {"state": "running", "step": step})
        )
        return self.out


@pytest.fixture
def again(ranks: RankPool, straight: Path, tmp_path: Path) -> Again:
    return Again(ranks, straight, tmp_path / "out")


def test_the_straight_run_is_worth_comparing_with(straight: Path) -> None:
    last = contents(straight, STEPS)
    assert [cut["step"] for cut in metrics(straight, "cut")] == CUTS
    assert len(last.lora) == 3 * 7 * 2 * 4
    assert all(tensor.isfinite().all() and tensor.any() for tensor in last.lora.values())
    assert len({tuple(heads) for heads, _ in last.kept}) > 1
    evaluated = {e["name"]: e["perplexity"] for e in metrics(straight, "evaluation")}
    for step in (CUTS[-1], STEPS):
        assert read_state(straight, step)["totals"] == {
            "tokens": sum(record["tokens"] for record in metrics(straight, "step")[:step]),
            "perplexity_dense": evaluated["dense"],
            "perplexity": evaluated["after_last_cut"] if step == CUTS[-1] else None,
        }


def test_stopped_before_at_and_after_a_cut(again: Again) -> None:
    config, out, straight = again.config(NO_SAVES), again.out, again.straight
    for i, stop in enumerate(STOPS):
        assert again.run(config, "auto" if i else None, stop) == [False, False]
        assert again.status()["state"] == "stopped"
        assert_bitwise(contents(out, stop), contents(straight, stop))
    assert again.run(config, "auto") == [True, True]
    assert_same_run(out, straight, STEPS)
    state, never_stopped = (read_state(folder, STEPS) for folder in (out, straight))
    assert state["resumed_from"] == STOPS
    assert state["totals"] == never_stopped["totals"]
    found, expected = (read_json(folder / "report.json") for folder in (out, straight))
    assert found["resumed_from"] == STOPS
    assert found["perplexity"] == expected["perplexity"]
    assert [cut["step"] for cut in found["prune_steps"]] == CUTS
    assert (out / "kept_groups.json").read_bytes() == (straight / "kept_groups.json").read_bytes()


def test_on_another_number_of_ranks(again: Again) -> None:
    """Checks that dropout has the same masks there, too."""
    again.run(again.config(NO_SAVES), None, CUTS[1])
    again.run(again.config(NO_SAVES), "auto", ranks=3)
    assert_close(again.out, again.straight)


@pytest.mark.parametrize(("stop", "micro_batch_size"), [heavy(CUTS[0] + 1, 3), (CUTS[2] - 1, 2)])
def test_other_micro_batches_on_fewer_ranks(
    again: Again, no_dropout: Path, stop: int, micro_batch_size: int
) -> None:
    again.run(again.config(*NO_DROPOUT), None, stop, ranks=3)
    again.run(
        again.config(*NO_DROPOUT, f"train.micro_batch_size={micro_batch_size}"), "auto", ranks=1
    )
    assert_close(again.out, no_dropout)


# Damaged, lost and foreign checkpoints


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit": ("step-13/lora-00001.safetensors", flip_bit, "damaged"),
    "counters missing": ("step-13/resume/state.json", Path.unlink, "missing"),
    "state of another kind": ("step-13/state.json", lambda path: path.write_text("[]"), "damaged"),
    "passes of a rank missing": ("step-13/resume/passes-00001.pt", Path.unlink, "missing"),
    "passes of a rank cut short": (
        "step-13/resume/passes-00000.pt",
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    again: Again, refitted: Path, name: str
) -> None:
    path, damage, word = DAMAGES[name]
    damaged = again.killed_after(13, refitted) / "checkpoints" / path
    damage(damaged)
    for found in again.find(again.config(REFIT)):
        assert (found.step, found.error) == (12, None)
        (warning,) = found.warnings
        assert str(damaged) in warning
        assert word in warning


def test_frozen_weights_are_slices_of_the_source_until_a_refit_changes_them(
    straight: Path, refitted: Path
) -> None:
    """The linears that lost inputs are whole in a step, and no other."""

    def refits(run: Path, step: int) -> set[str]:
        files = (run / f"checkpoints/step-{step}").glob("refit-*.safetensors")
        return {name for path in files for name in load_file(path)}

    assert [refits(run, step) for run, step in ((straight, STEPS), (refitted, CUTS[0] - 1))] == [
        set(),
        set(),
    ]
    passes = [f"step-{n}/resume/passes-0000{rank}.pt" for n in (17, 19) for rank in (0, 1)]
    assert [(refitted / "checkpoints" / name).exists() for name in passes] == [True] * 2 + [
        False
    ] * 2  # no cut is left that needs them
    shape, dense = (
        open_pretrained(path).shape.parameters()
        for path in (refitted / "model", straight.parent / "source")
    )
    narrower = {name for name in shape if dense[name][1:] != shape[name][1:]}
    assert any("o_proj" in name for name in narrower)
    assert refits(refitted, STEPS) == narrower


def test_a_step_with_a_damaged_refit_is_written_again(again: Again, refitted: Path) -> None:
    """Resumes from the good step before it. All later ones go."""
    out = again.killed_after(13, refitted)
    for step in (12, 13):
        flip_bit(out / f"checkpoints/step-{step}/refit-00001.safetensors")
    config = again.config(NO_SAVES, REFIT)
    found = again.find(config)[1]
    assert (found.step, len(found.warnings)) == (11, 2)
    assert all("refit-00001" in warning for warning in found.warnings)
    again.run(config, "auto", 12)
    assert sorted(path.name for path in (out / "checkpoints").glob("step-1?")) == [
        "step-10",
        "step-11",
        "step-12",
    ]
    assert again.find(config)[0].step == 12
    again.run(config, "auto")
    assert_same_run(out, refitted, STEPS)


@pytest.mark.parametrize(
    ("rank", "name"),
    [(1, "lora-00001.safetensors"), (0, "scores.safetensors"), (1, "refit-00001.safetensors")],
)
def test_a_rank_without_room_loses_nothing_older(
    again: Again, refitted: Path, rank: int, name: str
) -> None:
    out = again.killed_after(13, refitted)
    before = again.files()
    config = again.config(REFIT)
    where = rf"{out}/checkpoints/\.step-14\.\w+\.partial cannot be written: "
    for line, code in again.ranks.run(2, resuming.run_on_full_disk, config, "auto", rank, name):
        assert re.search(where, line)
        assert "No space left on device" in line
        assert "\n" not in line
        assert code == 1
    assert again.files() == before
    assert again.status()["state"] == "failed"
    assert "No space left on device" in again.status()["error"]
    assert again.find(config)[0].step == 13


def test_a_model_without_room_is_refused_before_anything_is_written(again: Again) -> None:
    for line in again.ranks.run(2, resuming.start_without_room, again.config()):
        assert f"{again.out} needs" in line
        assert "make room" in line
    assert not again.out.exists()


def test_results_without_room_are_made_by_the_next_start(again: Again) -> None:
    out = again.killed_after(STEPS)
    for writer in ("write_model", "write_results", "write_model_card"):  # in their order
        for line, code in again.ranks.run(2, resuming.run_without_room_for, again.config(), writer):
            assert str(out) in line
            assert "cannot be written: " in line
            assert "File too large" in line
            assert "\n" not in line
            assert code == 1
        assert again.status()["state"] == "failed"
    assert again.run(again.config(), "auto") == [True, True]
    assert_same_run(out, again.straight, STEPS)


def test_from_another_folder_with_its_records_and_frozen_weights(
    again: Again, refitted: Path
) -> None:
    """Checks that the new folder gets its own copy of the weights."""
    before = sorted(refitted.rglob("*"))
    again.run(again.config(NO_SAVES, REFIT), str(refitted / "checkpoints/step-18"))
    assert_same_run(again.out, refitted, STEPS)
    assert (again.out / f"checkpoints/step-{STEPS}/refit-00001.safetensors").exists()
    assert sorted(refitted.rglob("*")) == before


def test_a_start_builds_the_modules_once(again: Again, straight: Path, refitted: Path) -> None:
    for name, resume in (("new", None), ("sliced", straight), ("refitted", refitted)):
        config = again.config(
            NO_SAVES, REFIT if resume == refitted else NO_SAVES, out=again.out / name
        )
        step = resume and str(resume / "checkpoints/step-18")
        assert again.ranks.run(2, resuming.builds_of_a_start, config, step) == [1, 1]


@pytest.mark.parametrize("left", [".model.exported", "model"])
def test_killed_between_model_and_report(again: Again, left: str) -> None:
    """Before its folder had its name, and after."""
    out = again.killed_after(STEPS)
    shutil.copytree(again.straight / "model", out / left)
    (out / left / "exported").touch()
    assert again.run(again.config(), "auto") == [True, True]
    found, expected = (read_json(folder / "report.json") for folder in (out, again.straight))
    assert found["perplexity"] == expected["perplexity"]
    assert found["resumed_from"] == []  # the training was not
    assert (out / "kept_groups.json").read_bytes() == (
        again.straight / "kept_groups.json"
    ).read_bytes()
    assert (out / "model/README.md").read_bytes() == (
        again.straight / "model/README.md"
    ).read_bytes()
    assert (out / "model/exported").exists()
    assert not (out / ".model.exported").exists()


def test_a_model_of_a_later_step_than_the_resumed_one_is_made_again(again: Again) -> None:
    out = again.killed_after(STEPS - 1)
    for left in (".model.exported", "model"):
        (out / left).mkdir()
    assert again.run(again.config(), "auto") == [True, True]
    assert_same_run(out, again.straight, STEPS)


def test_a_model_that_cannot_be_read_back_is_never_published(again: Again) -> None:
    out = again.killed_after(STEPS)
    shutil.copytree(again.straight / "model", out / ".model.exported")
    weights = next((out / ".model.exported").glob("model-00002*"))
    weights.write_bytes(weights.read_bytes()[:-9])
    assert all(
        weights.name in line
        for line in again.ranks.run(2, refused, resuming.run_here, again.config(), "auto")
    )
    assert not (out / "model").exists()
    assert again.status()["state"] == "failed"
    assert again.run(again.config(), "auto") == [True, True]
    assert_same_run(out, again.straight, STEPS)


def test_a_source_that_has_changed_stops_the_export_until_it_is_back(
    again: Again, tmp_path: Path
) -> None:
    source, moved = again.straight.parent / "source", tmp_path / "moved"
    out = again.killed_after(STEPS)
    weights = next(source.glob("*.safetensors"))
    shutil.copy(weights, moved)
    try:
        merge_into("model.layers.2.mlp.down_proj.weight")(source)
        before = again.files()
        for line in again.ranks.run(2, refused, resuming.run_here, again.config(), "auto"):
            assert f"{source} is not the source model of" in line
        assert again.files() == before
    finally:
        shutil.copy(moved, weights)  # with another mtime
    assert again.run(again.config(), "auto") == [True, True]
    assert_same_run(out, again.straight, STEPS)


@pytest.mark.parametrize("between", [1, 2, 3])
def test_asked_to_stop_between_the_steps(again: Again, between: int) -> None:
    out = again.killed_after(STEPS if between == 3 else STEPS - 1)
    assert again.run(again.config(), "auto", None, between) == [False, False]
    assert again.status()["state"] == "stopped"
    assert {path.name for path in out.glob("*model*")} == (
        {".model.exported"} if between == 3 else set()
    )
    assert (out / f"checkpoints/step-{STEPS}").exists() == (between > 1)
    if between == 3:
        assert again.run(again.config(), "auto") == [True, True]
        assert_bitwise(contents(out, STEPS), contents(again.straight, STEPS))
        assert not list(out.glob(".*"))


def test_no_rank_leaves_before_the_folder_says_that_the_run_is_stopped(again: Again) -> None:
    """Checks the order of exits. The first rank that leaves makes the launcher end the others."""
    again.killed_after(13)
    assert again.ranks.run(2, resuming.state_on_return, again.config(), "auto", 15) == [
        "stopped",
        "stopped",
    ]


def test_after_a_power_cut_the_checkpoints_are_enough(again: Again) -> None:
    out = again.killed_after(13)
    for name in ("status.json", "config.yaml"):
        (out / name).write_text("")
    assert again.find(again.config())[0].step == 13
    assert "belongs to a run with other settings: seed" in str(
        again.find(again.config("seed=1"))[0].error
    )


def change_source(out: Path, **changes: Any) -> None:
    """Changes the source of the slices in all checkpoints."""
    for path in (out / "checkpoints").glob("step-*"):
        state = read_state(out, int(path.name.removeprefix("step-")))
        state["origin"] |= changes
        (path / "state.json").write_text(json.dumps(state))
        manifest = read_json(path / "manifest.json")["files"]
        write_manifest(path, manifest | {"state.json": seal(path / "state.json")})


def test_a_misfit_checkpoint_is_not_given_up(again: Again) -> None:
    """The first save after an older one would remove it."""
    out = again.killed_after(13)
    change_source(out, digest="0" * 64)
    for found in again.find(again.config()):
        assert "is not the source model of" in str(found.error)
        assert (found.exit_code, found.warnings) == (2, [])


def test_a_source_that_has_moved_is_found_by_model_path(again: Again, tmp_path: Path) -> None:
    out = again.killed_after(13)
    change_source(out, folder=str(tmp_path / "moved"))
    again.run(again.config(), "auto")
    assert_bitwise(contents(out, STEPS), contents(again.straight, STEPS))


def test_an_export_takes_the_source_that_the_run_began_with(again: Again, tmp_path: Path) -> None:
    """As an older snapshot of the hub, beside a newer one at `model.path`."""
    out = again.killed_after(STEPS)
    older = shutil.copytree(again.straight.parent / "source", tmp_path / "older")
    change_source(out, folder=str(older))
    assert again.run(again.config(), "auto") == [True, True]
    assert_same_run(out, again.straight, STEPS)


def test_a_run_may_have_the_name_of_a_step(again: Again, tmp_path: Path) -> None:
    again.killed_after(13).rename(tmp_path / "step-1")
    for path in ("step-1", "step-1/checkpoints", "step-1/checkpoints/step-13"):
        found = again.find(again.config(), str(tmp_path / path))[0]
        assert (found.step, found.error) == (13, None), path


def test_nothing_usable_starts_over_and_says_so(again: Again) -> None:
    found = again.find(again.config())[0]
    assert (found.step, found.warnings) == (None, ["no usable checkpoint: starting at step 0"])


def test_what_cannot_be_resumed_is_one_line(again: Again, tmp_path: Path) -> None:
    new, straight = tmp_path / "new", str(again.straight)
    shutil.copytree(again.straight.parent / "source", tmp_path / "other_model")
    other_model = again.config(f"model.path={tmp_path / 'other_model'}", out=new)
    other_batch = again.config("train.global_batch_size=12", "seed=1", out=new)
    cases = [
        (other_model, straight, "other settings: model.path"),
        (other_batch, straight, "other settings: seed, train.global_batch_size"),
    ]
    for config, resume, line in cases:
        for found in again.find(config, resume):
            assert found.error is not None
            assert line in found.error
            assert "\n" not in found.error
            assert found.exit_code == 2
    assert not new.exists()


@pytest.mark.parametrize(
    ("name", "key"), [("text.txt", "data.path"), ("held.txt", "data.held_out")]
)
def test_a_run_does_not_go_on_over_other_data(
    ranks: RankPool, tmp_path: Path, name: str, key: str
) -> None:
    """Nor measures another held-out text than of its dense model."""
    (tmp_path / "held.txt").write_text("alpha beta gamma " * 50)
    own = {"held_out": str(tmp_path / "held.txt"), "held_out_fraction": None}
    config = resuming.config_for(
        resuming.write_run(tmp_path, data=own if name == "held.txt" else {}), tmp_path / "out"
    )
    assert not any(ranks.run(1, resuming.run_here, config, None, 1))
    path = tmp_path / name
    # at its beginning, and the end is held out
    path.write_text(path.read_text().replace("alpha", "delta", 1))
    (line,) = ranks.run(1, refused, resuming.run_here, config, "auto")
    assert line.endswith(f"step-1 belongs to a run with other data: {key}")
