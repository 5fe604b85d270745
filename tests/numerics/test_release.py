"""An engine's memory is free before the next model comes, although DeepSpeed still refers to the engine."""

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
from loraprune_ds.evaluate import evaluation
from loraprune_ds.evaluate.evaluation_text import EvaluationText
from loraprune_ds.evaluate.perplexity import PerplexityProtocol
from loraprune_ds.evaluate.settings import EvaluationSettings
from loraprune_ds.train import run
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.memory import state_tensors, storage_bytes, weight_tensors
from tests.integration.resuming import config_for, run_here, write_run
from tests.numerics import cutting
from tests.numerics.driver import Job, build, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool

HEADS, CHANNELS = [0, 2], [c for c in range(45) if c % 3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("release")
    sizes: dict[str, Any] = {"heads": 6, "kv_heads": 3, "head_dim": 8, "hidden": 42, "ffn": 45, "biases": True}
    model = make_tiny_llama(folder / "model", layers=3, vocab=97, seed=1, **sizes)
    adapter = write_adapter(folder / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=4, samples=8, tokens=12, vocab=97, seed=3)
    return Job(model, adapter, batches, {"ratio": 0.1, "prune_every": 1}, dtype="bfloat16")


def live_bytes() -> Callable[[], int]:
    """Counts the storages of all tensors that Python has made since this call, garbage included."""
    gc.collect()
    gc.freeze()  # what is there already is not seen any more
    return lambda: storage_bytes(t for t in gc.get_objects() if isinstance(t, Tensor) and t.device.type != "meta")


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
    ("config", "world_size"), [("zero3", 1), ("zero3", 2), ("zero3_multinode", 2), ("zero3_offload", 2)]
)
def test_nothing_of_a_training_engine_is_left(ranks: RankPool, job: Job, config: str, world_size: int) -> None:
    around = ranks.run(world_size, bytes_around_release, replace(job, deepspeed=f"ds_configs/{config}.json"))
    samples = 2 * storage_bytes([torch.cat([ids for ids, _ in job.batches])])
    groups = 3 * (3 + 45) * 8  # in all layers. Scores and kept groups are as many numbers
    for state, before, after in around:
        assert before > state > 10 * (samples + groups)
        assert after < samples + 10 * groups


def recording(module: Any, live: Callable[[], int], alive: list[int], shards: list[int]) -> Any:
    """Patches the module's `build_inference_engine`. Records what is alive just before, and the shards it makes."""
    build_engine = module.build_inference_engine

    def building(*args: Any) -> Any:
        alive.append(live())
        engine = build_engine(*args)
        shards.append(storage_bytes(weight_tensors(engine)))
        return engine

    return patch.object(module, "build_inference_engine", building)


def bytes_beside_the_export(config: RunConfig) -> tuple[int, int]:
    """Returns the bytes of the exported model's shards, and those alive when it is read back in a run."""
    alive: list[int] = []
    shards: list[int] = []
    with recording(run, live_bytes(), alive, shards):
        assert run_here(config)
    return shards[0], alive[0]


def test_a_run_does_not_hold_what_it_trained_beside_what_it_measures(ranks: RankPool, tmp_path: Path) -> None:
    folder = write_run(tmp_path, train={"steps": 2})
    config = config_for(folder, tmp_path / "out", "model.dtype=bfloat16")
    ((shards, alive),) = ranks.run(1, bytes_beside_the_export, config)
    assert alive < shards  # the samples. The trained model's shards and LoRA's state are more


def bytes_between_models(folder: Path) -> tuple[int, int]:
    """Evaluates two models. Returns the bytes of one's shards, and those still alive when the second is built."""
    alive: list[int] = []
    shards: list[int] = []
    text = EvaluationText("a text", None, "It is long enough for some windows of eight tokens. " * 2)
    settings = EvaluationSettings(PerplexityProtocol(window=8), text=text, dtype="float32", sharded=True)
    with recording(evaluation, live_bytes(), alive, shards):
        first, second = evaluation.evaluate([str(folder)] * 2, settings, Communicator())
    assert first.perplexity == second.perplexity
    return shards[0], alive[1] - alive[0]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sharded_evaluation_holds_one_model_at_a_time(ranks: RankPool, job: Job, world_size: int) -> None:
    for shards, left in ranks.run(world_size, bytes_between_models, job.folder):
        assert shards > 20_000
        assert left < 500  # rotary frequencies, sums of the losses
