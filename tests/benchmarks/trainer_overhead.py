"""Measures what the callback adds to a step of transformers' Trainer, and compares it with the package's own trainer.

    python -m tests.benchmarks.trainer_overhead [--rounds 2] [--steps 5]

Each round trains six layers of SmolLM2-135M's widths on two CPU ranks, in fp32: with Trainer alone, with the callback,
and with our own trainer. Every step scores and none cuts. The first step does not count. Medians go to
tests/benchmarks/results/trainer_overhead.json.
"""

import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from loraprune_ds import LoraPruneCallback, PruneConfig
from tests.benchmarks.running import make_parser, record
from tests.hf.trainers import arguments, fresh_accelerate, make_trainer
from tests.numerics.driver import Job, build, tiny_job
from tests.oracle.models import make_batches
from tests.ranks import RankPool

SIZES: dict[str, Any] = {"heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "ffn": 1536, "layers": 6}
SIZES["vocab"] = 997
PRUNE = {"ratio": 0.3, "prune_every": 1000, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}


class Clock(TrainerCallback):
    """Takes the seconds of each step. It stands before the callback that is measured."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:  # right after all callbacks' on_step_end
            self.seconds.append(time.perf_counter() - self._began)


def with_trainer(job: Job, out: Path, *, prunes: bool) -> list[float]:
    with fresh_accelerate():
        clock = Clock()
        callbacks: list[TrainerCallback] = [clock]
        if prunes:
            callbacks.append(LoraPruneCallback(PruneConfig(**job.prune), steps=2 * len(job.batches)))
        make_trainer(job, arguments(job, out), *callbacks).train()
        return clock.seconds[1:]


def alone(job: Job) -> list[float]:
    trainer = build(job)
    return [trainer.step(step).seconds for step in range(1, len(job.batches) + 1)][1:]


def measure(job: Job, out: Path, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {"trainer": [], "callback": [], "own": []}
    for _ in range(rounds):
        times["trainer"] += with_trainer(job, out, prunes=False)
        times["callback"] += with_trainer(job, out, prunes=True)
        times["own"] += alone(job)
    return times


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as out, closing(RankPool()) as pool:
        batches = make_batches(steps=options.steps, samples=8, tokens=128, vocab=SIZES["vocab"], seed=2, masked=False)
        settings = {"lora_r": 8, "lora_alpha": 16, "learning_rate": 1e-4}
        job = replace(tiny_job(Path(out), PRUNE, steps=1, model=SIZES, **settings), batches=batches)
        times = pool.run(2, measure, job, Path(out), options.rounds, timeout=3600)[0]
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    result = {
        "seconds_per_step": median,
        "callback_over_trainer": median["callback"] / median["trainer"],
        "own_over_trainer": median["own"] / median["trainer"],
        "all_seconds": times,
        "rounds": options.rounds,
        "model": SIZES,
        "tokens_per_step": torch.numel(job.batches[0][0]),
        "world_size": 2,
        "prune": PRUNE,
    }
    record("trainer_overhead", result)


if __name__ == "__main__":
    main()
