"""Runs with a live teacher: they end as with a stored one, on 1 and 2 ranks, and a resume changes no bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.resuming import assert_same_run, config_for, contents, losses, metrics, run_here, write_run
from tests.ranks import RankPool

STEPS, CUTS, STOP_AT = 8, [4, 6, 8], 5
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_dropout": 0.0},
    "prune": {
        "channel_multiple": 1,
        "prune_every": 2,
        "warmup_fraction": 0.25,
        "cooldown_fraction": 0.0,
        "criterion": "fisher",
        "compensate": "least_squares",
    },
    "train": {"steps": STEPS, "distill_weight": 0.5, "distill_temperature": 2},
}
LIVE = "train.teacher=live"
# A stored teacher's pass has 8 samples, a live one's 1: fp32 sums in another order, as with another number of ranks in
# test_resume_quality_settings.py.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def given(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a config. Beside it are `stored` and `live`, what it ends with on 2 ranks."""
    folder = tmp_path_factory.mktemp("live-teacher")
    config = write_run(folder, **SECTIONS)
    ranks.run(2, run_here, config_for(config, folder / "stored"))
    ranks.run(2, run_here, config_for(config, folder / "live", LIVE))
    return config


def assert_close(out: Path, expected: Path) -> None:
    assert losses(out) == pytest.approx(losses(expected), abs=TOLERANCE)
    assert contents(out, STEPS).kept == contents(expected, STEPS).kept


def test_both_teachers_teach_the_same(ranks: RankPool, given: Path, tmp_path: Path) -> None:
    stored, live = given.parent / "stored", given.parent / "live"
    assert [cut["step"] for cut in metrics(live, "cut")] == CUTS
    assert_close(live, stored)
    ranks.run(1, run_here, config_for(given, tmp_path / "alone", LIVE))
    assert_close(tmp_path / "alone", stored)
    files = [{path.relative_to(out) for path in out.rglob("*")} for out in (stored, live)]
    assert files[0] == files[1]  # the live one is saved nowhere


def test_a_resumed_run_ends_as_the_run_that_never_stopped(ranks: RankPool, given: Path, tmp_path: Path) -> None:
    config = config_for(given, tmp_path / "out", LIVE)
    assert not any(ranks.run(2, run_here, config, None, STOP_AT))
    assert not (tmp_path / "out" / "teacher").exists()
    assert all(ranks.run(2, run_here, config, "auto"))
    assert_same_run(tmp_path / "out", given.parent / "live", STEPS)


def test_a_run_that_lost_its_files_goes_on_with_a_live_teacher(ranks: RankPool, given: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not any(ranks.run(2, run_here, config_for(given, out), None, STOP_AT))
    shutil.rmtree(out / "teacher")
    assert all(ranks.run(2, run_here, config_for(given, out, LIVE), "auto"))
    assert_close(out, given.parent / "stored")
