"""A run with int8 weights that is stopped between cuts: its checkpoint, how it goes on, its export."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.export.formats import export
from loraprune_ds.export.lora import ExportSource, find_source
from loraprune_ds.model.frozen import SCALE, WEIGHT
from tests.families import MIXTURES, families
from tests.integration import resuming
from tests.integration.resuming import assert_equal_tensors, assert_same_run, config_for, read_tensors, run_here
from tests.ranks import RankPool

STEPS, CUTS, STOP_AT = 8, [4, 6, 8], 5
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bfloat16", "frozen": "int8"},
    "prune": resuming.REFITS,
    "train": {"steps": STEPS, "distill_weight": 0.5},
    "checkpoint": {"every": None},
}


@pytest.fixture(scope="module")
def straight(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8-run")
    ranks.run(2, run_here, config_for(resuming.write_run(folder, **SECTIONS), folder / "out"))
    return folder / "out"


def test_a_resumed_run_ends_as_the_run_that_never_stopped(ranks: RankPool, straight: Path, tmp_path: Path) -> None:
    out, given = tmp_path / "out", straight.parent / "config.yaml"
    assert not any(ranks.run(2, run_here, config_for(given, out), None, STOP_AT))
    stored = read_tensors(out / "checkpoints" / "shape-1")
    linears = [name.removesuffix(SCALE) for name in stored if name.endswith(SCALE)]
    assert len(linears) == 3 * 7
    assert all(stored[name + WEIGHT].dtype == torch.int8 for name in linears)
    assert resuming.read_state(out, STOP_AT)["shape"]["folder"] == "shape-1"
    (other,) = ranks.run(1, resuming.find_here, config_for(given, out, "model.frozen=null"), "auto")
    assert "holds another run (model.frozen differs)" in str(other.error)
    assert all(ranks.run(2, run_here, config_for(given, out), "auto"))

    assert [cut["step"] for cut in resuming.metrics(straight, "cut")] == CUTS
    assert_same_run(out, straight, STEPS)


@pytest.mark.parametrize("family", families("gpt_oss", of=MIXTURES))
def test_experts_go_on_and_are_exported_as_the_run_would(ranks: RankPool, tmp_path: Path, family: str) -> None:
    """What a resumed run holds is read from the source, or after a refit of heads from stored integers and scales."""
    stored = family in ("gpt_oss", "qwen3_moe")
    prune = SECTIONS["prune"] | ({"head_ratio": 0.4} if stored else {"compensate": "none"})
    sections = SECTIONS | {"prune": prune, "train": {"steps": STEPS}}
    given, straight, out = resuming.write_run(tmp_path, **sections), tmp_path / "straight", tmp_path / "out"
    changes = resuming.write_family(tmp_path, family)
    ranks.run(2, run_here, config_for(given, straight, changes))
    assert not any(ranks.run(2, run_here, config_for(given, out, changes), None, STOP_AT))
    held = (name for name, x in read_tensors(out / "checkpoints" / "shape-1").items() if x.dtype == torch.int8)
    assert any("experts" in name for name in held) == stored
    assert all(ranks.run(2, run_here, config_for(given, out, changes), "auto"))
    cuts = [cut["step"] for cut in resuming.metrics(straight, "cut")]
    assert min(cuts) < STOP_AT < max(cuts)
    assert_same_run(out, straight, STEPS)
    export(ExportSource("int8", None, find_source(out).checkpoints), "hf", tmp_path / "merged")
    assert_equal_tensors(read_tensors(tmp_path / "merged"), read_tensors(straight / "model"))


def test_a_checkpoint_is_exported_as_the_run_would(straight: Path, tmp_path: Path) -> None:
    checkpoints = find_source(straight).checkpoints
    export(ExportSource("int8", None, checkpoints), "hf", tmp_path / "merged")
    assert_equal_tensors(read_tensors(tmp_path / "merged"), read_tensors(straight / "model"))
    export(ExportSource("int8", None, checkpoints), "adapter", tmp_path / "apart")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "apart" / "base").values()} == {torch.bfloat16}
