"""Stops a run with `fisher`, refit, distillation and recovery. Resumed, it ends with the same bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.checkpoint.layout import sha256
from tests.support import resuming
from tests.support.ranks import RankPool
from tests.support.resuming import (
    assert_same_run,
    config_for,
    losses,
    metrics,
    read_state,
    run_here,
    write_run,
)

STEPS, RECOVERY, CUTS, FIRST = 8, 2, [4, 6, 8], 6
TOTAL, LAYER = STEPS + RECOVERY, "model-00002-of-00004.safetensors"
NO_DROPOUT = ("lora.lora_dropout=0", "train.learning_rate=1e-3")
SECTIONS: dict[str, dict[str, Any]] = {
    "prune": resuming.REFITS | {"criterion": "fisher"},
    "train": {
        "steps": STEPS,
        "recovery_steps": RECOVERY,
        "distill_weight": 0.5,
        "distill_temperature": 2,
    },
    "checkpoint": {"every": None, "keep_last": 1},
}


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levers")
    ranks.run(2, run_here, config_for(write_run(folder, **SECTIONS), folder / "out"))
    return folder / "out"


def test_stopped_twice_and_taken_up_again(ranks: RankPool, straight: Path, tmp_path: Path) -> None:
    config = config_for(straight.parent / "config.yaml", tmp_path / "out")
    assert not any(ranks.run(2, run_here, config, None, 1))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "stopped"
    assert not any(ranks.run(2, run_here, config, "auto", FIRST))
    step = tmp_path / "out" / "checkpoints" / f"step-{FIRST}"
    assert len(list(step.glob("resume/passes-*.pt"))) == 2  # one of each rank
    assert all(ranks.run(2, run_here, config, "auto"))

    assert [cut["step"] for cut in metrics(straight, "cut")] == CUTS
    assert read_state(tmp_path / "out", TOTAL)["resumed_from"] == [1, FIRST]
    assert_same_run(tmp_path / "out", straight, TOTAL)
    assert not list(
        (straight / "checkpoints" / f"step-{TOTAL}").glob("resume/passes-*")
    )  # no cut is left that needs them


def test_a_run_killed_after_its_model_is_there_can_be_finished(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    """Kills it before status.json says "finished"."""
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert all(ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out), "auto"))
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


@pytest.fixture(scope="module")
def no_dropout(ranks: RankPool, straight: Path) -> Path:
    """Makes a run that others can be compared with. Dropout draws by micro-batch, so it is off."""
    out = straight.parent / "no_dropout"
    ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out, *NO_DROPOUT))
    return out


@pytest.mark.heavy  # test_resume_families does so in CI
@pytest.mark.parametrize(
    ("before", "micro_batch_size", "after"),
    [(2, 1, 3), (3, 2, 2)],  # at last three passes a step for two ranks
)
def test_goes_on_with_another_number_of_ranks(
    ranks: RankPool,
    no_dropout: Path,
    tmp_path: Path,
    before: int,
    micro_batch_size: int,
    after: int,
) -> None:
    """Stops between two cuts, so the next refit repeats passes of before and after the stop."""
    given = no_dropout.parent / "config.yaml"
    of_before = (*NO_DROPOUT, f"train.micro_batch_size={micro_batch_size}")
    ranks.run(before, run_here, config_for(given, tmp_path / "out", *of_before), None, FIRST - 1)
    moved = config_for(given, tmp_path / "out", *NO_DROPOUT)
    assert all(ranks.run(after, run_here, moved, "auto"))
    found, expected = (resuming.contents(out, TOTAL).kept for out in (tmp_path / "out", no_dropout))
    assert found == expected
    # sums in fp32 in another order, as in tests/numerics
    assert losses(tmp_path / "out") == pytest.approx(losses(no_dropout), abs=1e-5)


def test_the_learning_rate_rises_for_the_recovery(straight: Path) -> None:
    rates = [step["learning_rate"] for step in metrics(straight, "step")]
    assert rates == pytest.approx(
        [5e-3 * part for n in (STEPS, RECOVERY) for part in (1 - s / n for s in range(n))]
    )
    assert metrics(straight, "step")[-1]["sparsity"] == pytest.approx(
        metrics(straight, "cut")[-1]["reached"]
    )


def test_a_model_is_exported_once_and_whole(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    """Goes on from the last step, with the model not read back, and killed while it was written."""
    out, written = tmp_path / "out", dict[str, Any]()
    config = config_for(straight.parent / "config.yaml", out)
    for left in (".model.exported", "..model.exported.1234.partial"):
        shutil.copytree(straight, out)
        (out / "model").rename(out / left)
        (out / left / "written").touch()
        (out / "status.json").write_text(
            (out / "status.json").read_text().replace("finished", "running")
        )
        assert all(ranks.run(2, run_here, config, "auto"))
        written[left] = (out / "model" / "written").exists()
        assert sha256(out / "model" / LAYER) == sha256(straight / "model" / LAYER)
        shutil.rmtree(out)
    assert list(written.values()) == [True, False]


def test_a_resume_elsewhere_past_the_end_exports_what_is_there(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    config = config_for(straight.parent / "config.yaml", tmp_path / "out")
    step = straight / "checkpoints" / f"step-{TOTAL}"
    assert all(ranks.run(2, run_here, config, str(step)))
    assert sha256(tmp_path / "out" / "model" / LAYER) == sha256(straight / "model" / LAYER)


def test_a_model_of_a_later_step_that_an_earlier_start_left_goes(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    """Goes on from a step before the end, in a folder that has the model."""
    config = config_for(straight.parent / "config.yaml", tmp_path / "out")
    assert not any(ranks.run(2, run_here, config, None, FIRST))
    shutil.copytree(straight / "model", tmp_path / "out" / "model")
    assert not any(ranks.run(2, run_here, config, "auto", FIRST + 1))
    assert not (tmp_path / "out" / "model").exists()
