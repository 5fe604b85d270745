"""Resumes runs of families with biases, fused linears, or norms that are cut without LoRA, on other ranks.

The tolerance and its reason are those of test_resume.py.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from loraprune_ds.config import RunConfig
from loraprune_ds.export.formats import export
from loraprune_ds.export.lora import ExportSource
from loraprune_ds.model import read_shape
from loraprune_ds.model.shapes import ModelShape, Sizes
from tests.families import families
from tests.integration import resuming
from tests.integration.resuming import config_for, contents, losses, read_tensors, run_here, write_family, write_run
from tests.ranks import RankPool

TOLERANCE = 1e-5
STEPS, STOP, WINDOW = 8, 5, 24
SECTIONS = {
    "lora": {"lora_dropout": 0.0},
    "prune": {"prune_every": 3, "ratio": 0.25},  # no more of a helium can go
    "train": {"steps": STEPS},
    "evaluate": {"window": WINDOW},
    "checkpoint": {"every": None},
}

IN_CI = ("qwen2", "phi3", "olmo2", "mixtral", "qwen3_5_text", "qwen3_5_moe_text", "glm4_moe_lite", "gemma4_text", "t5")


@pytest.mark.parametrize("family", families(*IN_CI))
def test_goes_on_with_another_number_of_ranks(ranks: RankPool, tmp_path: Path, family: str) -> None:
    config = write_run(tmp_path, **SECTIONS)
    changed, straight = write_family(tmp_path, family), tmp_path / "straight"
    ranks.run(2, run_here, config_for(config, straight, changed))
    ranks.run(2, run_here, config_for(config, tmp_path / "out", changed), None, STOP)
    ranks.run(3, run_here, config_for(config, tmp_path / "out", changed), "auto")

    cuts = [cut["step"] for cut in resuming.metrics(straight, "cut")]
    assert min(cuts) < STOP < max(cuts)
    found, expected = contents(tmp_path / "out", STEPS), contents(straight, STEPS)
    assert found.kept == expected.kept
    assert losses(tmp_path / "out") == pytest.approx(losses(straight), abs=TOLERANCE)
    masters = [name for name in expected.lora if name.endswith(".master")]
    assert masters
    assert max(float((found.lora[n] - expected.lora[n]).abs().max()) for n in masters) < TOLERANCE


def run_as_before(config: RunConfig, resume: str | None = None, stop_at: int | None = None) -> bool:
    """Runs like `run_here`, but as the versions did that had neither LoRA nor int8 on whole linears."""

    def others(shape: ModelShape, layer: int, inside: Sizes) -> Sizes:
        cut = shape.layer_parameters(layer)
        return {name: size for name, size in inside.items() if f"model.layers.{layer}.{name}" not in cut}

    with mock.patch.object(read_shape, "_whole", return_value={}), mock.patch.object(read_shape, "_others", others):
        return run_here(config, resume, stop_at)


@pytest.mark.parametrize(
    ("family", "frozen", "linears", "prune"),
    [
        ("qwen2_moe", None, 10, {}),
        ("deepseek_v3", "int8", 8, {"ranking": "uniform", "head_ratio": 0.2}),  # no heads of its dense layer left
    ],
)
def test_a_run_that_began_without_lora_on_whole_linears_goes_on_without(
    ranks: RankPool, tmp_path: Path, family: str, frozen: str | None, linears: int, prune: dict[str, Any]
) -> None:
    train = {"steps": STEPS, "distill_weight": 0.5}  # the teacher's linears are stored like the student's
    prune = SECTIONS["prune"] | prune
    config = write_run(tmp_path, **SECTIONS | {"train": train, "model": {"frozen": frozen}, "prune": prune})
    changed, straight, out = write_family(tmp_path, family), tmp_path / "straight", tmp_path / "out"
    ranks.run(2, run_as_before, config_for(config, straight, changed))
    assert not any(ranks.run(2, run_as_before, config_for(config, out, changed), None, STOP))
    assert all(ranks.run(2, run_here, config_for(config, out, changed), "auto"))

    assert len(contents(straight, STEPS).lora) == linears * 2 * 3
    resuming.assert_same_run(out, straight, STEPS)
    source = ExportSource("before", None, [out / "checkpoints" / f"step-{STEPS}"])
    export(source, "hf", tmp_path / "merged")
    resuming.assert_equal_tensors(read_tensors(tmp_path / "merged"), read_tensors(straight / "model"))
    export(source, "adapter", tmp_path / "apart")
    assert len(read_tensors(tmp_path / "apart" / "adapter")) == linears * 2
