"""Stops a run with `fisher`, refit, distillation and recovery twice. Resumed, it ends with the same bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.integration.resuming import (
    REFITS,
    assert_same_run,
    config_for,
    contents,
    losses,
    metrics,
    read_state,
    run_here,
    write_run,
)
from tests.ranks import RankPool

STEPS, RECOVERY, CUTS, STOP_AT = 8, 2, [4, 6, 8], 5
SECTIONS: dict[str, dict[str, Any]] = {
    "prune": REFITS | {"criterion": "fisher"},
    "train": {"steps": STEPS, "recovery_steps": RECOVERY, "distill_weight": 0.5, "distill_temperature": 2},
    "checkpoint": {"every": None},
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
    assert not any(ranks.run(2, run_here, config, "auto", STOP_AT))
    step = tmp_path / "out" / "checkpoints" / f"step-{STOP_AT}"
    assert len(list(step.glob("moments-*.safetensors"))) == 3  # one of each layer
    assert all(ranks.run(2, run_here, config, "auto"))

    total = STEPS + RECOVERY
    assert [cut["step"] for cut in metrics(straight, "cut")] == CUTS
    assert read_state(tmp_path / "out", total)["resumed_from"] == [1, STOP_AT]
    assert_same_run(tmp_path / "out", straight, total)
    assert not list((straight / "checkpoints" / f"step-{total}").glob("moments-*"))  # no cut is left that needs them


def test_a_kill_after_the_model_is_published_leaves_a_run_that_can_be_finished(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    """Kills it before status.json says "finished". An earlier version kept the teacher's outputs in a folder."""
    out = tmp_path / "out"
    shutil.copytree(straight, out)
    (out / "teacher").mkdir()
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    assert all(ranks.run(2, run_here, config_for(straight.parent / "config.yaml", out), "auto"))
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert not (out / "teacher").exists()


def test_goes_on_with_another_number_of_ranks(ranks: RankPool, straight: Path, tmp_path: Path) -> None:
    """Checks the moments, each layer's on one rank. Dropout draws by rank, so it is off."""
    given, settings = straight.parent / "config.yaml", ("lora.lora_dropout=0", "train.learning_rate=1e-3")
    here, moved = (config_for(given, tmp_path / name, *settings) for name in ("here", "moved"))
    ranks.run(2, run_here, here)
    ranks.run(2, run_here, moved, None, STOP_AT)
    assert all(ranks.run(3, run_here, moved, "auto"))
    found, expected = (contents(tmp_path / name, STEPS + RECOVERY).kept for name in ("moved", "here"))
    assert found == expected
    # sums in fp32 in another order, as in tests/numerics
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "here"), abs=1e-5)


def test_the_recovery_starts_at_the_learning_rate_again(straight: Path) -> None:
    rates = [step["learning_rate"] for step in metrics(straight, "step")]
    assert rates == pytest.approx([5e-3 * (1 - s / STEPS) for s in range(STEPS)] + [5e-3, 2.5e-3])
    assert metrics(straight, "step")[-1]["sparsity"] == pytest.approx(metrics(straight, "cut")[-1]["reached"])
