"""A run with int8 or NF4 weights that is stopped between cuts: its checkpoint, how it goes on, its export."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.frozen import SCALE, WEIGHT
from tests.support import resuming
from tests.support.families import MIXTURES, families, heavy
from tests.support.ranks import RankPool
from tests.support.resuming import assert_same_run, config_for, read_tensors, run_here

STEPS, CUTS, STOP_AT = 8, [4, 6, 8], 5
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16", "frozen": "int8"},
    "prune": resuming.REFITS,
    "train": {"steps": STEPS, "distill_weight": 0.5},
    "checkpoint": {"every": None},
}


# With refits an NF4 run holds int8 weights, too.
@pytest.fixture(scope="module", params=[heavy("int8"), "nf4"])
def straight(
    ranks: RankPool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    sections = SECTIONS | {"model": {"dtype": "bfloat16", "frozen": request.param}}
    ranks.run(2, run_here, config_for(resuming.write_run(folder, **sections), folder / "out"))
    return folder / "out"


def test_a_resumed_run_ends_as_the_run_that_never_stopped(
    ranks: RankPool, straight: Path, tmp_path: Path
) -> None:
    out, given = tmp_path / "out", straight.parent / "config.yaml"
    assert not any(ranks.run(2, run_here, config_for(given, out), None, STOP_AT))
    stored = read_tensors(out / "checkpoints" / f"step-{STOP_AT}", "refit-*")
    linears = [name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)]
    assert linears
    assert all(stored[name + WEIGHT].dtype == torch.int8 for name in linears)
    (other,) = ranks.run(1, resuming.find_here, config_for(given, out, "model.frozen=null"), "auto")
    assert "holds another run (model.frozen differs)" in str(other.error)
    assert all(ranks.run(2, run_here, config_for(given, out), "auto"))

    assert [cut["step"] for cut in resuming.metrics(straight, "cut")] == CUTS
    assert_same_run(out, straight, STEPS)


def test_it_goes_on_on_other_ranks_and_in_one_process(ranks: RankPool, tmp_path: Path) -> None:
    """Without refits all weights are made from the source again, whatever the ranks."""
    prune = SECTIONS["prune"] | {"compensate": "none"}
    sections = SECTIONS | {"prune": prune, "model": {"dtype": "float32", "frozen": "nf4"}}
    given = resuming.write_run(tmp_path, **sections)
    settings = ("lora.lora_dropout=0", "train.learning_rate=1e-3")
    alone = (*settings, "deepspeed=null")
    ranks.run(1, run_here, config_for(given, tmp_path / "alone", *alone))
    moved = config_for(given, tmp_path / "moved", *settings)
    assert not any(ranks.run(2, run_here, moved, None, STOP_AT))
    assert all(ranks.run(3, run_here, moved, "auto"))
    found, expected = (tmp_path / name for name in ("moved", "alone"))
    assert resuming.contents(found, STEPS).kept == resuming.contents(expected, STEPS).kept
    # sums in fp32 in another order, as in tests/numerics
    assert resuming.losses(found) == pytest.approx(resuming.losses(expected), abs=1e-5)
    exports = [read_tensors(out / "model") for out in (found, expected)]
    torch.testing.assert_close(*exports, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "family", families("gpt_oss", of=(x for x in MIXTURES if not FAMILIES[x].lm_class()))
)
def test_experts_go_on_as_the_run_that_never_stopped(
    ranks: RankPool, tmp_path: Path, family: str
) -> None:
    """What a resumed run holds is read from the source, and after a refit of heads also from stored integers."""
    refits = family in ("gpt_oss", "qwen3_moe")
    prune = SECTIONS["prune"] | ({"head_ratio": 0.4} if refits else {"compensate": "none"})
    sections = SECTIONS | {"prune": prune, "train": {"steps": STEPS}}
    given, straight, out = (
        resuming.write_run(tmp_path, **sections),
        tmp_path / "straight",
        tmp_path / "out",
    )
    changes = resuming.write_family(tmp_path, family)
    ranks.run(2, run_here, config_for(given, straight, changes))
    assert not any(ranks.run(2, run_here, config_for(given, out, changes), None, STOP_AT))
    stored = read_tensors(out / "checkpoints" / f"step-{STOP_AT}", "refit-*")
    assert any(x.dtype == torch.int8 for x in stored.values()) == refits
    assert not any("experts" in name for name in stored)
    assert all(ranks.run(2, run_here, config_for(given, out, changes), "auto"))
    cuts = [cut["step"] for cut in resuming.metrics(straight, "cut")]
    assert min(cuts) < STOP_AT < max(cuts)
    assert_same_run(out, straight, STEPS)
