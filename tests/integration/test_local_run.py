"""One process without DeepSpeed trains like two ranks of ZeRO-3. Each goes on from a step of the other."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import ROOT, clean_environment, read_json
from tests.support.ranks import RankPool
from tests.support.resuming import (
    REFITS,
    assert_close,
    assert_same_run,
    config_for,
    metrics,
    read_state,
    run_here,
    write_run,
)

STEPS, CUTS = 8, [4, 6, 8]
ALONE = "deepspeed=null"
SECTIONS: dict[str, dict[str, Any]] = {
    "prune": REFITS | {"criterion": "fisher"},
    "train": {
        "steps": STEPS,
        "distill_weight": 0.5,
        "lr_scheduler": "cosine",
        "max_grad_norm": 0.1,
    },
    "checkpoint": {"every": None},
}
WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # makes an import fail
from loraprune_ds.cli import run
config, out = sys.argv[1:]
sys.argv = ["run", "--config", config, "--set", "deepspeed=null", "--set", f"output_dir={out}"]
assert run.launch() == 0
assert not any(name.startswith("deepspeed.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("local"), **SECTIONS)


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """Makes a run where DeepSpeed cannot be imported."""
    out = config.parent / "alone"
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(config), str(out)]
    ended = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert "ZeRO-3" not in ended.stdout + ended.stderr
    return out


@pytest.fixture(scope="module")
def sharded(ranks: RankPool, config: Path) -> Path:
    ranks.run(2, run_here, config_for(config, config.parent / "sharded"))
    return config.parent / "sharded"


def test_one_process_without_deepspeed_ends_like_two_ranks_of_zero_3(
    alone: Path, sharded: Path
) -> None:
    assert [cut["step"] for cut in metrics(alone, "cut")] == CUTS
    assert_close(alone, sharded, STEPS)
    norms, expected = (
        [step["grad_norm"] for step in metrics(out, "step")] for out in (alone, sharded)
    )
    assert norms == pytest.approx(expected, rel=1e-5)
    assert min(norms) > 0.1  # clipped
    found, expected = (read_json(out / "report.json") for out in (alone, sharded))
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-5)


def test_a_resume_across_a_cut_changes_no_bit(
    ranks: RankPool, config: Path, alone: Path, tmp_path: Path
) -> None:
    again = config_for(config, tmp_path, ALONE)
    for resume, stop in ((None, CUTS[0] - 1), ("auto", CUTS[1]), ("auto", None)):
        ranks.run(1, run_here, again, resume, stop)
    assert_same_run(tmp_path, alone, STEPS)


def test_each_goes_on_from_a_step_of_the_other(
    ranks: RankPool, config: Path, sharded: Path, tmp_path: Path
) -> None:
    ranks.run(1, run_here, config_for(config, tmp_path, ALONE), None, 3)
    ranks.run(2, run_here, config_for(config, tmp_path), "auto", 5)
    ranks.run(1, run_here, config_for(config, tmp_path, ALONE), "auto")
    assert read_state(tmp_path, STEPS)["resumed_from"] == [3, 5]
    assert_close(tmp_path, sharded, STEPS)
