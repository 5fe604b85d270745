"""Resumes runs of families with biases, fused linears, two stacks, or norms that are cut without LoRA, on other ranks.

The tolerance and its reason are those of test_resume.py.
"""

from pathlib import Path
from unittest.mock import patch

import pytest

from loraprune_ds.config import RunConfig
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.pretrained import read_shape
from tests.support import resuming
from tests.support.families import TINY, families, is_seq2seq
from tests.support.ranks import RankPool
from tests.support.resuming import (
    assert_same_run,
    config_for,
    contents,
    losses,
    run_here,
    write_family,
    write_run,
)

TOLERANCE = 1e-5
STEPS, STOP, WINDOW = 8, 5, 24
SECTIONS = {
    "lora": {"lora_dropout": 0.0},
    "data": {"packing": True},  # which text ignores. Not all families can pack
    "prune": {"prune_every": 3, "ratio": 0.25},  # no more of a helium can go
    "train": {"steps": STEPS},
    "evaluate": {"window": WINDOW},
    "checkpoint": {"every": None},
}

IN_CI = ("qwen3_5_moe_text", "t5")  # delta nets with experts, and two stacks


@pytest.mark.parametrize(
    "family", families(*IN_CI, of=(x for x in TINY if not FAMILIES[x].lm_class()))
)
def test_goes_on_with_another_number_of_ranks(ranks: RankPool, tmp_path: Path, family: str) -> None:
    config = write_run(tmp_path, **SECTIONS)
    straight = tmp_path / "straight"
    changes = [write_family(tmp_path, family)]
    # A pass of two stacks has inputs of both. Where only experts leave, nothing is refitted.
    if is_seq2seq(family) or FAMILIES[family].has_experts:
        changes.append("prune.compensate=least_squares")
    ranks.run(2, run_here, config_for(config, straight, *changes))
    ranks.run(2, run_here, config_for(config, tmp_path / "out", *changes), None, STOP)
    ranks.run(3, run_here, config_for(config, tmp_path / "out", *changes), "auto")

    cuts = [cut["step"] for cut in resuming.metrics(straight, "cut")]
    assert min(cuts) < STOP < max(cuts)
    found, expected = contents(tmp_path / "out", STEPS), contents(straight, STEPS)
    assert found.kept == expected.kept
    assert losses(tmp_path / "out") == pytest.approx(losses(straight), abs=TOLERANCE)
    masters = [name for name in expected.lora if name.endswith(".master")]
    assert masters
    assert max(float((found.lora[n] - expected.lora[n]).abs().max()) for n in masters) < TOLERANCE


def test_a_run_of_an_earlier_version_goes_on_with_whole_heads(
    ranks: RankPool, tmp_path: Path
) -> None:
    """It cut a key-value head with its query heads also where there are two."""
    config, straight, out = write_run(tmp_path, **SECTIONS), tmp_path / "straight", tmp_path / "out"
    settings = write_family(tmp_path, "glm4"), "deepspeed=null", "prune.ranking=global"
    ranks.run(1, run_as_earlier, config_for(config, straight, *settings))
    ranks.run(1, run_as_earlier, config_for(config, out, *settings), STOP)
    ranks.run(1, run_here, config_for(config, out, *settings), "auto")
    assert_same_run(out, straight, STEPS)
    assert min(heads for cut in resuming.metrics(out, "cut") for heads in cut["heads"]) == 1


def run_as_earlier(config: RunConfig, stop_at: int | None = None) -> bool:
    with patch.object(read_shape, "FEW_HEADS", 0):
        return run_here(config, None, stop_at)
