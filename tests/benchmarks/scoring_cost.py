"""Measures the CPU seconds that scoring adds to a training step, by criterion.

    python -m tests.benchmarks.scoring_cost [--rounds 20] [--criteria fisher lora gradient] [--ranks 2]

SmolLM2-135M, 1,024 tokens a step on each rank. Every second step scores. Each scored step is compared with the mean of
the plain steps before and after it, so a slow drift cancels. It is the CPU time of rank 0, which does not count the
waiting for other processes. The interval holds 95 % of the means of 10,000 resampled rounds. The result goes to
tests/benchmarks/results/scoring_cost.json.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from loraprune_ds.config import Criterion, DataConfig, EvaluateConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.files import read_json, write_json
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.provenance import hardware, versions
from loraprune_ds.train.prepare import prepare
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.device import device_name
from loraprune_ds.zero.engine import build_training_engine, quiet_deepspeed, start_ranks, stop_ranks

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "scoring_cost.json"
WARM_UP = 3  # steps that are not timed; DeepSpeed records the order of the modules in the first ones


def make_config(criterion: Criterion, rounds: int, ranks: int) -> RunConfig:
    """Builds a config whose only cut would follow the last step."""
    batch = 8 * ranks
    return RunConfig(
        output_dir="unused",
        data=DataConfig(window=128),
        prune=PruneConfig(prune_every=1, warmup_fraction=0.99, cooldown_fraction=0, criterion=criterion),
        train=TrainConfig(
            steps=WARM_UP + 2 * rounds + 2, global_batch_size=batch, micro_batch_size=8, learning_rate=1e-4
        ),
        evaluate=EvaluateConfig(window=128, max_windows=1),
    )


def rank_main(criterion: Criterion, rounds: int, result: Path) -> None:
    quiet_deepspeed()
    comm = start_ranks()
    config = make_config(criterion, rounds, comm.world_size)
    prepared = prepare(config, comm, is_first_on_node=comm.rank == 0)
    schedule = replace(prepared.schedule, score_every=2)  # the odd steps
    engine = build_training_engine(config, prepared.pretrained, prepared.ds_config, prepared.steps)
    pruner = Pruner(engine.model, config.prune, schedule, prepared.limits, config.seed)
    trainer = Trainer(
        engine, pruner, prepared.samples, prepared.order, config.train, dtype=config.model.dtype, seed=config.seed
    )
    seconds: list[float] = []
    for step in range(1, WARM_UP + 2 * rounds + 2):
        assert schedule.is_scored(step) == bool(step % 2)
        began = time.process_time()
        trainer.step(step)
        seconds.append(time.process_time() - began)
    if comm.rank == 0:
        facts = {"ranks": comm.world_size, "config": config.to_dict(), "hardware": hardware(device_name())}
        write_json(result, {**summary(seconds[WARM_UP:]), **facts, "versions": versions()})
    stop_ranks()


def summary(seconds: list[float]) -> dict[str, Any]:
    """Returns what a scored step adds, as a fraction of a plain one.

    Args:
        seconds: of steps, plain and scored by turns. The first and the last are plain.
    """
    plain, scored = seconds[::2], seconds[1::2]
    step = statistics.mean(plain)
    added = [(s - (a + b) / 2) / step for s, a, b in zip(scored, plain[:-1], plain[1:], strict=True)]
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(added, k=len(added))) for _ in range(10_000))
    return {
        "plain_seconds": step,
        "added": statistics.mean(added),
        "interval_95": [means[249], means[9749]],
        "rounds": added,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--criteria", nargs="+", default=["fisher", "lora", "gradient"])
    parser.add_argument("--ranks", type=int, default=2)
    for name in ("--criterion", "--local_rank"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=RESULT, help="default: tests/benchmarks/results")
    arguments = parser.parse_args()
    if arguments.criterion:
        rank_main(cast(Criterion, arguments.criterion), arguments.rounds, arguments.result)
        return
    criteria = read_json(arguments.result)["criteria"] if arguments.result.exists() else {}
    for criterion in arguments.criteria:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.json"
            command = [Path(sys.executable).with_name("deepspeed"), "--quiet", f"--num_accelerators={arguments.ranks}"]
            command += [Path(__file__), "--criterion", criterion, "--rounds", arguments.rounds, "--result", path]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
            criteria[criterion] = row = read_json(path)
        low, high = row["interval_95"]
        print(f"{criterion:<10}{row['added']:>8.2%} of {row['plain_seconds']:.2f} s  (95 %: {low:.2%} to {high:.2%})")
        write_json(arguments.result, {"criteria": criteria})


if __name__ == "__main__":
    main()
