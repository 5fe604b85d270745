"""One process without DeepSpeed trains like two ranks of ZeRO-3. Each goes on from a step of the other."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import ROOT, Ended, read_json, run_to_end
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
import json, sys
sys.modules["deepspeed"] = None  # makes an import fail
from pathlib import Path
from tests.support.local_training import make_model, train
from loraprune_ds import LoraPruneCallback
from loraprune_ds.cli import compare, evaluate, export, plan, run
config, out, dense = sys.argv[1:]
def call(function, *words):
    sys.argv[1:] = map(str, words)
    return function()
run_it = "--config", config, "--set", f"output_dir={out}", "--set"
assert call(run.launch, *run_it, "deepspeed=null") == 0
rows, *_ = train(make_model(Path(dense)))
assert rows[0][1] != rows[-1][1]
assert call(plan.main, "llama-7b", "--gpu-memory", 80) == 0
assert call(export.main, out, "--format", "adapter", "--out", out + "-adapter") == 0
result = call(lambda: evaluate.measure(evaluate.parse_arguments()), out, "--dense", dense, "--text", "README.md")
Path(out + ".json").write_text(json.dumps(result))
assert call(compare.main, out + ".json") == 0
assert not any(name.startswith(("deepspeed.", "loraprune_ds.zero.sharded")) for name in sys.modules)
print("now with ZeRO-3", file=sys.stderr)
assert call(run.main, "--config", config, "--set", f"output_dir={out}-sharded") == 2
assert call(evaluate.main, out, "--sharded") == 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("local"), **SECTIONS)


@pytest.fixture(scope="module")
def ended(config: Path) -> Ended:
    """Makes a run and gives all commands something to do where DeepSpeed cannot be imported."""
    files = [str(config.parent / name) for name in ("config.yaml", "alone", "source")]
    return run_to_end([sys.executable, "-c", WITHOUT_DEEPSPEED, *files], cwd=ROOT)


@pytest.fixture(scope="module")
def alone(config: Path, ended: Ended) -> Path:
    """Makes a run in one process."""
    assert ended.code == 0, ended.everything
    return config.parent / "alone"


@pytest.fixture(scope="module")
def sharded(ranks: RankPool, config: Path) -> Path:
    ranks.run(2, run_here, config_for(config, config.parent / "sharded"))
    return config.parent / "sharded"


def test_all_but_zero_3_needs_no_deepspeed(ended: Ended) -> None:
    assert ended.code == 0, ended.everything
    before, after = ended.err.split("now with ZeRO-3")
    assert "ZeRO-3" not in before
    errors = [line for line in after.splitlines() if line.startswith("error: ")]
    assert ["deepspeed" in line.lower() for line in errors] == [True, True]


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
