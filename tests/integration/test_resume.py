"""Compares a run that was stopped and resumed with the run that never stopped.

At the same world size every number is computed by the same operations in the same order. So everything is compared bit
by bit. On another number of ranks sums have another order. Then the tolerance is 1e-5, as
tests/numerics/test_sharded_equals_dense.py explains. Dropout is on, but where micro-batches get another size.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from loraprune_ds.checkpoint.layout import FORMAT, seal, write_manifest
from tests.integration.resuming import (
    CUTS,
    STEPS,
    assert_bitwise,
    assert_same_run,
    config_for,
    contents,
    find_here,
    losses,
    metrics,
    read_state,
    run_here,
    run_on_full_disk,
    state_on_return,
    write_run,
)
from tests.ranks import RankPool

TOLERANCE = 1e-5
NO_DROPOUT = ("lora.lora_dropout=0", "checkpoint.every=null")
STOPS = [CUTS[0] - 1, CUTS[1], CUTS[-1] + 1]  # before a cut, at one, and after one


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run on two ranks that was never stopped. It has a checkpoint of every step, its config beside it."""
    folder = tmp_path_factory.mktemp("straight")
    ranks.run(2, run_here, config_for(write_run(folder), folder / "out"))
    return folder / "out"


@pytest.fixture(scope="module")
def copied(ranks: RankPool, straight: Path) -> Path:
    """Makes the same with the frozen weights in folders of their own."""
    out = straight.parent / "copied"
    ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out, "checkpoint.copy_source=true"))
    return out


@pytest.fixture
def again(straight: Path) -> Path:
    return straight.parent / "config.yaml"


def test_the_straight_run_is_worth_comparing_with(straight: Path) -> None:
    last = contents(straight, STEPS)
    assert [cut["step"] for cut in metrics(straight, "cut")] == CUTS
    assert len(last.lora) == 3 * 7 * 2 * 3
    assert all(tensor.isfinite().all() and tensor.any() for tensor in last.lora.values())
    assert len({tuple(heads) for heads, _ in last.kept}) > 1
    evaluated = {e["name"]: e["perplexity"] for e in metrics(straight, "evaluation")}
    for step in (CUTS[-1], STEPS):
        assert read_state(straight, step)["totals"] == {
            "tokens": sum(record["tokens"] for record in metrics(straight, "step")[:step]),
            "perplexity_dense": evaluated["dense"],
            "perplexity": evaluated["after_last_cut"] if step == CUTS[-1] else None,
        }


def test_stopped_before_at_and_after_a_cut(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    config = config_for(again, tmp_path / "out", "checkpoint.every=null")
    for i, stop in enumerate(STOPS):
        assert ranks.run(2, run_here, config, "auto" if i else None, stop) == [False, False]
        assert json.loads((tmp_path / "out/status.json").read_text())["state"] == "stopped"
        assert_bitwise(contents(tmp_path / "out", stop), contents(straight, stop))
    assert ranks.run(2, run_here, config, "auto") == [True, True]

    assert_same_run(tmp_path / "out", straight, STEPS)
    state, never_stopped = (read_state(out, STEPS) for out in (tmp_path / "out", straight))
    assert state["resumed_from"] == STOPS
    assert state["totals"] == never_stopped["totals"]
    found, expected = (json.loads((out / "report.json").read_text()) for out in (tmp_path / "out", straight))
    assert found["resumed_from"] == STOPS
    assert found["perplexity"] == expected["perplexity"]
    assert [cut["step"] for cut in found["prune_steps"]] == CUTS
    assert (tmp_path / "out/kept_groups.json").read_bytes() == (straight / "kept_groups.json").read_bytes()


def test_in_bf16_too(ranks: RankPool, again: Path, tmp_path: Path) -> None:
    """Checks that the low-precision copies that a step uses are those of the masters."""
    bf16 = ("model.dtype=bfloat16", "prune.ranking=global", "checkpoint.every=null")
    ranks.run(2, run_here, config_for(again, tmp_path / "straight", *bf16))
    config = config_for(again, tmp_path / "out", *bf16)
    ranks.run(2, run_here, config, None, CUTS[1] + 1)
    ranks.run(2, run_here, config, "auto")
    assert_same_run(tmp_path / "out", tmp_path / "straight", STEPS)


@pytest.fixture(scope="module")
def no_dropout(ranks: RankPool, straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("no_dropout") / "out"
    ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out, *NO_DROPOUT))
    return out


def test_on_another_number_of_ranks(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    """Checks that dropout has the same masks there, too."""
    config = config_for(again, tmp_path / "out", "checkpoint.every=null")
    ranks.run(2, run_here, config, None, CUTS[1])
    ranks.run(3, run_here, config, "auto")
    assert_close(tmp_path / "out", straight)


@pytest.mark.parametrize(("stop", "micro_batch_size"), [(CUTS[0] + 1, 3), (CUTS[2] - 1, 2)])
def test_with_other_micro_batches_on_another_number_of_ranks(
    ranks: RankPool, no_dropout: Path, again: Path, tmp_path: Path, stop: int, micro_batch_size: int
) -> None:
    config = partial(config_for, again, tmp_path / "out", *NO_DROPOUT)
    ranks.run(3, run_here, config(), None, stop)
    ranks.run(1, run_here, config(f"train.micro_batch_size={micro_batch_size}"), "auto")
    assert_close(tmp_path / "out", no_dropout)


def assert_close(out: Path, straight: Path) -> None:
    found, expected = contents(out, STEPS), contents(straight, STEPS)
    assert found.kept == expected.kept
    for suffix in ("master", "exp_avg", "exp_avg_sq"):  # moments relative to the largest: they have gradients' units
        names = [name for name in expected.lora if name.endswith(f".{suffix}")]
        assert len(names) == 3 * 7 * 2
        scale = 1.0 if suffix == "master" else max(float(expected.lora[name].abs().max()) for name in names)
        assert max(float((found.lora[n] - expected.lora[n]).abs().max()) for n in names) < TOLERANCE * scale, suffix
    for name, scores in expected.scores.items():
        assert torch.allclose(found.scores[name], scores, rtol=TOLERANCE, atol=0), name
    assert losses(out) == pytest.approx(losses(straight), abs=TOLERANCE)


def killed_after(straight: Path, step: int, folder: Path) -> Path:
    """Makes the remains of a run killed some time after `step`: its checkpoints, and metrics ahead of them."""
    out = folder / "out"
    shutil.copytree(straight, out, ignore=shutil.ignore_patterns("model", "report.json", "kept_groups*"))
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running", "step": step}))
    return out


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit": ("step-13/layer-00001.safetensors", flip_a_bit, "damaged"),
    "scores cut short": ("step-13/scores.safetensors", truncate, "damaged"),
    "a layer missing": ("step-13/layer-00002.safetensors", Path.unlink, "missing"),
    "no manifest": ("step-13/manifest.json", Path.unlink, "missing"),
    "state of another kind": ("step-13/state.json", lambda path: path.write_text("[]"), "damaged"),
    "an empty state": ("step-13/state.json", lambda path: path.write_text(""), "damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    ranks: RankPool, straight: Path, again: Path, tmp_path: Path, name: str
) -> None:
    path, damage, word = DAMAGES[name]
    out = killed_after(straight, 13, tmp_path)
    damage(out / "checkpoints" / path)
    for found in ranks.run(2, find_here, config_for(again, out), "auto"):
        assert (found.step, found.error) == (12, None)
        assert len(found.warnings) == 1
        assert str(out / "checkpoints" / path) in found.warnings[0]
        assert word in found.warnings[0]


def test_frozen_weights_are_slices_of_the_source_or_copies_with_the_same_outcome(straight: Path, copied: Path) -> None:
    assert not list((straight / "checkpoints").glob("shape-*"))
    assert {path.name for path in (copied / "checkpoints").glob("shape-*")} == {
        f"shape-{i}" for i in range(len(CUTS) + 1)
    }
    assert all(read_state(straight, step)["shape"]["is_source"] for step in (1, STEPS))
    assert_bitwise(contents(copied, STEPS), contents(straight, STEPS))


def test_a_damaged_shape_spoils_all_steps_that_name_it(
    ranks: RankPool, copied: Path, again: Path, tmp_path: Path
) -> None:
    out = killed_after(copied, 13, tmp_path)
    flip_a_bit(next((out / "checkpoints/shape-2").glob("model-*.safetensors")))
    found = ranks.run(2, find_here, config_for(again, out), "auto")[1]
    assert found.step == 11
    assert len(found.warnings) == 2
    assert all("shape-2" in warning for warning in found.warnings)


def test_what_a_damaged_checkpoint_is_replaced_with_is_good(
    ranks: RankPool, straight: Path, copied: Path, again: Path, tmp_path: Path
) -> None:
    """Resumes from the good checkpoint. Step and shape are written anew, and all later ones go."""
    out = killed_after(copied, 13, tmp_path)
    flip_a_bit(next((out / "checkpoints/shape-2").glob("model-*.safetensors")))
    config = config_for(again, out, "checkpoint.every=null", "checkpoint.copy_source=true")
    ranks.run(2, run_here, config, "auto", 12)
    assert sorted(path.name for path in (out / "checkpoints").glob("step-1?")) == ["step-10", "step-11", "step-12"]
    assert ranks.run(2, find_here, config, "auto")[0].step == 12
    ranks.run(2, run_here, config, "auto")
    assert_same_run(out, straight, STEPS)


@pytest.mark.parametrize(
    ("rank", "name", "lost"),
    [
        (1, "layer-00001.safetensors", "step-14"),
        (0, "scores.safetensors", "step-14"),
        (1, "model-00002-of-00004.safetensors", "shape-3"),
    ],
)
def test_a_rank_without_room_ends_the_run_and_loses_nothing_older(
    ranks: RankPool, copied: Path, again: Path, tmp_path: Path, rank: int, name: str, lost: str
) -> None:
    out = killed_after(copied, 13, tmp_path)
    for path in (out / "checkpoints").glob("shape-3"):
        shutil.rmtree(path)
    before = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()}
    every = ("checkpoint.every=17",) if lost == "shape-3" else ()
    config = config_for(again, out, "checkpoint.copy_source=true", *every)
    where = rf"{out}/checkpoints/\.{lost}\.\w+\.partial cannot be written: "
    for line, code in ranks.run(2, run_on_full_disk, config, "auto", rank, name):
        assert re.search(where, line)
        assert "No space left on device" in line
        assert "\n" not in line
        assert code == 1
    assert {path: path.read_bytes() for path in (out / "checkpoints").rglob("*") if path.is_file()} == before
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "failed"
    assert "No space left on device" in status["error"]
    assert ranks.run(2, find_here, config, "auto")[0].step == 13


def test_from_another_folder_with_its_records(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    config = config_for(again, tmp_path / "branch", "checkpoint.every=null")
    before = sorted(path for path in straight.rglob("*"))
    ranks.run(2, run_here, config, str(straight / "checkpoints/step-18"))
    assert_same_run(tmp_path / "branch", straight, STEPS)
    assert sorted(path for path in straight.rglob("*")) == before


def test_from_another_folder_with_its_frozen_weights(
    ranks: RankPool, straight: Path, copied: Path, again: Path, tmp_path: Path
) -> None:
    """Checks that copies of the weights are written anew. The next checkpoint of a run without copies needs none."""
    for name, changes in {"copies": ("checkpoint.copy_source=true",), "slices": ()}.items():
        out = tmp_path / name
        config = config_for(again, out, "checkpoint.every=null", *changes)
        ranks.run(2, run_here, config, str(copied / "checkpoints/step-18"))
        assert_bitwise(contents(out, STEPS), contents(straight, STEPS))
        assert read_state(out, STEPS)["shape"]["is_source"] == (name == "slices")
        assert (out / "checkpoints/shape-3/manifest.json").exists() == (name == "copies")


def test_killed_between_model_and_report(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    out = killed_after(straight, STEPS, tmp_path)
    shutil.copytree(straight / "model", out / "model")
    assert ranks.run(2, run_here, config_for(again, out), "auto") == [True, True]
    report = json.loads((out / "report.json").read_text())
    assert report["perplexity"] == json.loads((straight / "report.json").read_text())["perplexity"]
    assert (out / "kept_groups.json").read_bytes() == (straight / "kept_groups.json").read_bytes()


@pytest.mark.parametrize(("between", "files"), [(1, set()), (2, set()), (3, {".model.partial"})])
def test_asked_to_stop_between_the_steps(
    ranks: RankPool, straight: Path, again: Path, tmp_path: Path, between: int, files: set[str]
) -> None:
    out = killed_after(straight, STEPS if between == 3 else STEPS - 1, tmp_path)
    config = config_for(again, out)
    assert ranks.run(2, run_here, config, "auto", None, between) == [False, False]
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert {re.sub(r"\.\w{8}\.partial", ".partial", path.name) for path in out.glob("*model*")} == files  # without mark
    assert (out / f"checkpoints/step-{STEPS}").exists() == (between > 1)
    if between == 3:
        assert ranks.run(2, run_here, config, "auto") == [True, True]
        assert_bitwise(contents(out, STEPS), contents(straight, STEPS))
        assert not list(out.glob(".*"))


def test_no_rank_leaves_before_the_folder_says_that_the_run_is_stopped(
    ranks: RankPool, straight: Path, again: Path, tmp_path: Path
) -> None:
    """Checks the order of exits. The first rank that leaves makes the launcher end the others."""
    out = killed_after(straight, 13, tmp_path)
    assert ranks.run(2, state_on_return, config_for(again, out), "auto", 15) == ["stopped", "stopped"]


def test_after_a_power_cut_the_checkpoints_are_enough(
    ranks: RankPool, straight: Path, again: Path, tmp_path: Path
) -> None:
    out = killed_after(straight, 13, tmp_path)
    for name in ("status.json", "config.yaml"):
        (out / name).write_text("")
    assert ranks.run(2, find_here, config_for(again, out), "auto")[0].step == 13
    (other,) = ranks.run(1, find_here, config_for(again, out, "seed=1"), "auto")
    assert "belongs to a run with other settings: seed" in str(other.error)


NEWER = f"format {FORMAT + 1}; this version of loraprune_ds reads format {FORMAT}"


def newer_format(out: Path) -> None:
    (out / "checkpoints/step-13/state.json").write_text(json.dumps(read_state(out, 13) | {"format": FORMAT + 1}))


def another_source(out: Path) -> None:
    change_source(out, digest="0" * 64)


def change_source(out: Path, **changes: str) -> None:
    """Changes the source of the slices in all checkpoints."""
    for path in (out / "checkpoints").glob("step-*"):
        state = read_state(out, int(path.name.removeprefix("step-")))
        assert state["shape"]["is_source"]
        (path / "state.json").write_text(json.dumps(state | {"shape": state["shape"] | changes}))
        manifest = json.loads((path / "manifest.json").read_text())["files"]
        write_manifest(path, manifest | {"state.json": seal(path / "state.json")})


@pytest.mark.parametrize(
    ("change", "line"), [(newer_format, f"step-13/state.json has {NEWER}"), (another_source, "is not the model that")]
)
def test_a_whole_checkpoint_that_does_not_fit_is_not_given_up_for_an_older_one(
    ranks: RankPool, straight: Path, again: Path, tmp_path: Path, change: Callable[[Path], None], line: str
) -> None:
    """The first save would remove it."""
    out = killed_after(straight, 13, tmp_path)
    change(out)
    for found in ranks.run(2, find_here, config_for(again, out), "auto"):
        assert line in str(found.error)
        assert (found.exit_code, found.warnings) == (2, [])


def test_a_source_that_has_moved_is_found_by_model_path(
    ranks: RankPool, straight: Path, again: Path, tmp_path: Path
) -> None:
    out = killed_after(straight, 13, tmp_path)
    change_source(out, folder=str(tmp_path / "moved"))
    ranks.run(2, run_here, config_for(again, out), "auto")
    assert_bitwise(contents(out, STEPS), contents(straight, STEPS))


def test_a_run_may_have_the_name_of_a_step(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    killed_after(straight, 13, tmp_path).rename(tmp_path / "step-1")
    for path in ("step-1", "step-1/checkpoints", "step-1/checkpoints/step-13"):
        (found,) = ranks.run(1, find_here, config_for(again, tmp_path / "new"), str(tmp_path / path))
        assert (found.step, found.error) == (13, None), path


def test_nothing_usable_starts_over_and_says_so(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    found = ranks.run(2, find_here, config_for(again, tmp_path / "new"), "auto")[0]
    assert (found.step, found.warnings) == (None, ["no usable checkpoint: starting at step 0"])


def test_what_cannot_be_resumed_is_one_line(ranks: RankPool, straight: Path, again: Path, tmp_path: Path) -> None:
    new = config_for(again, tmp_path / "new")
    newer = killed_after(straight, 1, tmp_path)
    state = read_state(newer, 1)
    (newer / "checkpoints/step-1/state.json").write_text(json.dumps(state | {"format": FORMAT + 1}))
    shutil.copytree(straight.parent / "source", tmp_path / "other_model")
    other_model = config_for(again, tmp_path / "new", f"model.path={tmp_path / 'other_model'}")
    other_batch = config_for(again, tmp_path / "new", "train.global_batch_size=12", "seed=1")
    held = config_for(again, newer)
    cases = [
        (new, str(tmp_path / "nowhere"), f"--resume {tmp_path / 'nowhere'}: no such folder"),
        (new, str(newer / "checkpoints/step-1"), NEWER),
        (other_model, str(straight), "other settings: model.path"),
        (other_batch, str(straight), "other settings: seed, train.global_batch_size"),
        (held, str(straight), f"output_dir {newer} holds a run already"),
    ]
    for config, resume, line in cases:
        for found in ranks.run(2, find_here, config, resume):
            assert found.error is not None
            assert line in found.error
            assert "\n" not in found.error
            assert found.exit_code == 2
    assert not (tmp_path / "new").exists()
