"""Every shipped DeepSpeed config gives the same bits on two CPU ranks. An engine leaves no memory behind."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import RunConfig
from loraprune_ds.engine.ds_config import resolve_ds_config
from loraprune_ds.evaluate import evaluation
from loraprune_ds.evaluate.settings import EvaluationSettings, EvaluationText
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import storage_bytes
from loraprune_ds.zero.engine import Zero3
from tests.support import cutting, quality_settings
from tests.support.driver import Job, build, tiny_job
from tests.support.families import heavy
from tests.support.launching import ROOT
from tests.support.ranks import RankPool
from tests.support.resuming import assert_equal_tensors, config_for, run_here, write_run
from tests.support.zero_bytes import state_tensors, weight_shards

BASELINE = "zero3"
OTHERS = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json") if path.stem != BASELINE)
HEADS, CHANNELS = [0, 2], [c for c in range(45) if c % 3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("configs")
    prune = {"ratio": 0.1, "prune_every": 1}
    return tiny_job(
        folder, prune, steps=4, samples=8, tokens=12, model={"biases": True}, dtype="bfloat16"
    )


def run_all(job: Job) -> dict[str, Any]:
    """Makes two steps, a cut and a step. Adds the dense model's losses on an engine without an optimizer."""
    result = cutting.cut_once(job, HEADS, CHANNELS)
    pretrained = open_pretrained(job.folder)
    config = RunConfig("unused", deepspeed=job.deepspeed)
    ranks = torch.distributed.get_world_size()
    resolved = resolve_ds_config(config, pretrained.shape, {}, ranks, ranks)
    engine = Zero3().build_inference_engine(pretrained, "sdpa", job.dtype, resolved)
    ids, labels = job.batches[0]
    return result | {"inference": engine.infer(input_ids=ids, labels=labels)}


@pytest.fixture(scope="module")
def baseline(ranks: RankPool, job: Job) -> dict[str, Any]:
    result = ranks.run(2, run_all, job)[0]
    changed = [
        n for n, tensor in result["before"].items() if tensor.shape != result["after"][n].shape
    ]
    assert len(changed) == 2 * (7 + 5 + 7 * 4)  # of two layers, as in test_cutting.py
    assert result["inference"].abs().sum() > 0
    return result


@pytest.mark.parametrize("name", [f"ds_configs/{name}.json" for name in OTHERS])
def test_the_same_bits_as_without(
    ranks: RankPool, job: Job, baseline: dict[str, Any], name: str
) -> None:
    results = ranks.run(2, run_all, replace(job, deepspeed=name))
    for when in ("before", "after"):
        assert_equal_tensors(results[0][when], baseline[when])
    assert results[0]["next_loss"] == baseline["next_loss"]
    assert torch.equal(results[0]["inference"], baseline["inference"])
    assert [r["alive"] for r in results] == [0, 0]


# LoRA and norms alone; also the linears that the cut makes small enough; all, as DeepSpeed's default has it here.
@pytest.mark.parametrize("below", [190, 1500, 100_000])
def test_small_weights_stay_gathered_through_a_cut(
    ranks: RankPool, job: Job, baseline: dict[str, Any], tmp_path: Path, below: int
) -> None:
    """Every rank keeps weights of fewer elements whole."""
    text = (ROOT / "ds_configs" / f"{BASELINE}.json").read_text()
    path = tmp_path / "ds.json"
    path.write_text(text.replace('persistence_threshold": 0', f'persistence_threshold": {below}'))
    test_the_same_bits_as_without(ranks, job, baseline, str(path))


@pytest.mark.parametrize("names", [["zero3_offload"], heavy(OTHERS)])
def test_quality_settings_find_the_same_bits(ranks: RankPool, job: Job, names: list[str]) -> None:
    """Runs fisher and compensation with weights and optimizer on the device or the host."""
    prune = {"ratio": 0.2, "prune_every": 2, "criterion": "fisher", "compensate": "least_squares"}
    wanted = ranks.run(2, quality_settings.train_and_cut, replace(job, prune=prune))[0]
    for name in names:
        other = replace(job, prune=prune, deepspeed=f"ds_configs/{name}.json")
        assert_equal_tensors(ranks.run(2, quality_settings.train_and_cut, other)[0], wanted)


# The memory is free, although DeepSpeed still refers to the engine


def live_bytes() -> Callable[[], int]:
    """Counts the storages of all tensors that Python has made since this call, garbage included."""
    gc.collect()
    gc.freeze()  # objects made before are not seen any more
    return lambda: storage_bytes(
        t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type != "meta"
    )


def bytes_around_release(job: Job) -> tuple[int, int, int]:
    """Returns the bytes that ZeRO-3 holds for training, and all that are alive before and after the release."""
    live = live_bytes()
    trainer = build(job)
    trainer.step(1)
    trainer.step(2)
    keep = cutting.some_keep(trainer, HEADS, CHANNELS)
    trainer.model.cut(keep)
    trainer.pruner.average.cut(keep)
    trainer.step(3)
    state, before = storage_bytes(state_tensors(trainer.model)), live()
    trainer.engine.release()
    return state, before, live()


@pytest.mark.parametrize(
    ("config", "world_size"),
    [("zero3", 1), ("zero3", 2), ("zero3_multinode", 2), ("zero3_offload", 2)],
)
def test_nothing_of_a_training_engine_is_left(
    ranks: RankPool, job: Job, config: str, world_size: int
) -> None:
    around = ranks.run(
        world_size, bytes_around_release, replace(job, deepspeed=f"ds_configs/{config}.json")
    )
    samples = 2 * storage_bytes([torch.cat([ids for ids, _ in job.batches])])
    groups = 3 * (3 + 45) * 8  # in all layers. Scores and kept groups are as many numbers
    for state, before, after in around:
        assert before > state > 10 * (samples + groups)
        assert after < samples + 10 * groups


def recording(live: Callable[[], int], alive: list[int], shards: list[int]) -> Any:
    """Patches `build_inference_engine`. Records the bytes alive just before, and the engine's shards."""
    build_engine = Zero3.build_inference_engine

    def building(*args: Any, **settings: Any) -> Any:
        alive.append(live())
        built = build_engine(*args, **settings)
        shards.append(storage_bytes(weight_shards(built.module)))
        return built

    return patch.object(Zero3, "build_inference_engine", building)


def bytes_beside_the_export(config: RunConfig) -> tuple[int, int]:
    """Returns the bytes of the exported model's shards, and those alive when it is read back in a run."""
    alive: list[int] = []
    shards: list[int] = []
    with recording(live_bytes(), alive, shards):
        assert run_here(config)
    return shards[-1], alive[-1]  # an earlier one was the teacher's


@pytest.mark.parametrize("train", [{}, {"distill_weight": 0.5}], ids=["plain", "distilled"])
def test_a_run_frees_what_it_trained_before_it_measures(
    ranks: RankPool, tmp_path: Path, train: dict[str, Any]
) -> None:
    folder = write_run(tmp_path, train={"steps": 2} | train)
    config = config_for(folder, tmp_path / "out", "model.dtype=bfloat16")
    ((shards, alive),) = ranks.run(1, bytes_beside_the_export, config)
    assert alive < shards  # the samples. The trained model's shards and LoRA's state are more


def bytes_between_models(folder: Path) -> tuple[int, int]:
    """Evaluates two models. Returns the bytes of one's shards, and those still alive when the second is built."""
    alive: list[int] = []
    shards: list[int] = []
    text = EvaluationText(
        "a text", None, "It is long enough for some windows of eight tokens. " * 2
    )
    settings = EvaluationSettings(window=8, text=text, dtype="float32", sharded=True)
    with recording(live_bytes(), alive, shards):
        first, second = evaluation.evaluate([str(folder)] * 2, settings, Communicator())
    assert first.perplexity == second.perplexity
    return shards[0], alive[1] - alive[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_evaluation_holds_one_model_at_a_time(
    ranks: RankPool, job: Job, world_size: int
) -> None:
    for shards, left in ranks.run(world_size, bytes_between_models, job.folder):
        assert shards > 20_000
        assert left < 500  # rotary frequencies, sums of the losses
