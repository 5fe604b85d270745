"""Every shipped DeepSpeed config, run on two ranks: training, a cut, training on, evaluation.

On a CPU all of them compute the same things in the same order on the same memory. So they must agree bit by bit.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import RunConfig
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.zero.ds_config import resolve_ds_config
from loraprune_ds.zero.engine import build_inference_engine
from tests.numerics import cutting, quality_settings
from tests.numerics.driver import Job, tiny_job
from tests.ranks import RankPool

ROOT = Path(__file__).parents[2]
BASELINE = "zero3"
OTHERS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json") if path.stem != BASELINE)
HEADS, CHANNELS = [0, 2], [c for c in range(45) if c % 3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("configs")
    prune = {"ratio": 0.1, "prune_every": 1}
    return tiny_job(folder, prune, steps=4, samples=8, tokens=12, model={"biases": True}, dtype="bfloat16")


def run_all(job: Job) -> dict[str, Any]:
    """Makes two steps, a cut and a step. Adds the dense model's losses on an engine without an optimizer."""
    result = cutting.cut_once(job, HEADS, CHANNELS)
    return result | {"inference": inference(job)}


def inference(job: Job) -> Tensor:
    pretrained = open_pretrained(job.folder)
    config = RunConfig("unused")
    resolved = resolve_ds_config(job.deepspeed, config, pretrained.shape, torch.distributed.get_world_size())
    engine = build_inference_engine(pretrained, "sdpa", job.dtype, resolved)
    with torch.no_grad():
        return engine(input_ids=job.batches[0][0], labels=job.batches[0][1])


@pytest.fixture(scope="module")
def baseline(ranks: RankPool, job: Job) -> dict[str, Any]:
    return ranks.run(2, run_all, job)[0]


def test_the_cut_under_test_removes_something(baseline: dict[str, Any]) -> None:
    changed = [n for n, tensor in baseline["before"].items() if tensor.shape != baseline["after"][n].shape]
    assert len(changed) == 2 * (7 + 5 + 7 * 4)  # of two layers, as in test_cutting.py
    assert baseline["inference"].abs().sum() > 0


@pytest.mark.parametrize("name", [f"ds_configs/{name}.json" for name in OTHERS])
def test_the_same_bits_as_without(ranks: RankPool, job: Job, baseline: dict[str, Any], name: str) -> None:
    results = ranks.run(2, run_all, replace(job, deepspeed=name))
    for when in ("before", "after"):
        assert set(results[0][when]) == set(baseline[when])
        for tensor_name, tensor in baseline[when].items():
            assert torch.equal(results[0][when][tensor_name], tensor), (when, tensor_name)
    assert results[0]["next_loss"] == baseline["next_loss"]
    assert torch.equal(results[0]["inference"], baseline["inference"])
    assert [r["alive"] for r in results] == [0, 0]


def kept_gathered(folder: Path, below: int) -> str:
    """Writes the shipped config, but for weights of fewer elements, which every rank keeps whole."""
    text = (ROOT / "ds_configs" / f"{BASELINE}.json").read_text()
    path = folder / f"below-{below}.json"
    path.write_text(text.replace('persistence_threshold": 0', f'persistence_threshold": {below}'))
    return str(path)


# LoRA and norms alone; also the linears that the cut makes small enough; all, as DeepSpeed's default has it here.
@pytest.mark.parametrize("below", [190, 1500, 100_000])
def test_small_weights_stay_gathered_through_a_cut(
    ranks: RankPool, job: Job, baseline: dict[str, Any], tmp_path: Path, below: int
) -> None:
    test_the_same_bits_as_without(ranks, job, baseline, kept_gathered(tmp_path, below))


def test_quality_settings_find_the_same_bits(ranks: RankPool, job: Job) -> None:
    """Runs true gradient and compensation with weights and optimizer on the device or the host."""
    prune = {"ratio": 0.2, "prune_every": 2, "criterion": "gradient", "compensate": "least_squares"}
    wanted = ranks.run(2, quality_settings.train_and_cut, replace(job, prune=prune))[0]
    for name in OTHERS:
        found = ranks.run(
            2, quality_settings.train_and_cut, replace(job, prune=prune, deepspeed=f"ds_configs/{name}.json")
        )[0]
        assert set(found) == set(wanted)
        assert [n for n, tensor in wanted.items() if not torch.equal(found[n], tensor)] == [], name
