"""Resumes runs of families with biases, fused linears, or norms that are cut without LoRA, on other ranks.

The tolerance and its reason are those of test_resume.py.
"""

from pathlib import Path

import pytest

from loraprune_ds.model.family import FAMILIES
from tests.families import MIXED, TINY, families
from tests.integration.resuming import config_for, contents, losses, metrics, run_here, write_family, write_run
from tests.ranks import RankPool

TOLERANCE = 1e-5
STEPS, STOP, WINDOW = 8, 5, 24
SECTIONS = {
    "lora": {"lora_dropout": 0.0},
    "prune": {"prune_every": 3},
    "train": {"steps": STEPS},
    "evaluate": {"window": WINDOW},
    "checkpoint": {"every": None},
}


def check_router_load(out: Path, family: str) -> None:
    """Each token of the held-out text chose its experts once, whatever rank it was on. Repeated passes do not count."""
    measured = [record for record in metrics(out, "evaluation") if record["name"] != "pruned"]
    chosen = TINY[family].get("num_experts_per_tok", 0)
    assert len(measured) >= 2
    for record in measured:
        choices, of_each = [sum(layer) for layer in record["expert_choices"]], record["windows"] * WINDOW * chosen
        assert choices == ([of_each * (family not in MIXED), of_each] if chosen else [])


@pytest.mark.parametrize("family", families("qwen2", "phi3", "olmo2", "mixtral", "qwen3_5_text", "qwen3_5_moe_text"))
def test_goes_on_with_another_number_of_ranks(ranks: RankPool, tmp_path: Path, family: str) -> None:
    config = write_run(tmp_path, **SECTIONS)
    changed, straight = write_family(tmp_path, family), tmp_path / "straight"
    ranks.run(2, run_here, config_for(config, straight, changed))
    ranks.run(2, run_here, config_for(config, tmp_path / "out", changed), None, STOP)
    ranks.run(3, run_here, config_for(config, tmp_path / "out", changed), "auto")

    cuts = [cut["step"] for cut in metrics(straight, "cut")]
    assert min(cuts) < STOP < max(cuts)
    found, expected = contents(tmp_path / "out", STEPS), contents(straight, STEPS)
    assert found.kept == expected.kept
    assert losses(tmp_path / "out") == pytest.approx(losses(straight), abs=TOLERANCE)
    for out in (straight, tmp_path / "out"):
        check_router_load(out, family)
        assert (out / "router_load.png").exists() == bool(FAMILIES[family].mixture)
    masters = [name for name in expected.lora if name.endswith(".master")]
    assert masters
    assert max(float((found.lora[n] - expected.lora[n]).abs().max()) for n in masters) < TOLERANCE
