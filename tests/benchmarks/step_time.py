"""Measures the time of scoring, of a cut, of a smaller model and of int8 weights. Three engines share the ranks.

    deepspeed --quiet --num_accelerators 2 tests/benchmarks/step_time.py [--steps 8] [--model FOLDER]

Each round runs a plain ZeRO-3 LoRA step, the same step with scoring, and a plain step of an engine cut by 50 % and of
one with int8 weights, so the noise of a shared machine affects all of them. Medians, and ratios of medians, go to
tests/benchmarks/results/step_time.json.
"""

import statistics
import time
from dataclasses import replace
from unittest.mock import patch

from loraprune_ds.config import (
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PruneConfig,
    RunConfig,
    TrainConfig,
)
from loraprune_ds.engines import run_engine
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.ranks.comm import stop_ranks
from loraprune_ds.ranks.device import device_name
from loraprune_ds.ranks.job import silence_libraries
from loraprune_ds.report.records import History, Recorder
from loraprune_ds.train.prepare import Prepared, prepare
from loraprune_ds.train.trainer import build_trainer
from tests.benchmarks.running import make_parser, record


class Timed:
    """A trainer whose steps can leave the scoring out."""

    def __init__(self, prepared: Prepared) -> None:
        self.trainer = build_trainer(prepared, Recorder(History(), []))
        self.pruning = self.trainer.pruning
        self.model = self.trainer.model
        self._observe = self.pruning.pruner.score

    def timed_step(self, *, scoring: bool) -> float:
        """Seconds of one step on all ranks."""
        self.pruning.pruner.score = self._observe if scoring else lambda step: None  # type: ignore[method-assign]
        self.model.comm.barrier()
        began = time.perf_counter()
        with patch.object(self.pruning, "cut", lambda: None):
            self.trainer.train_step()
        self.model.comm.barrier()
        return time.perf_counter() - began


def short_run(model: str, prune: PruneConfig, steps: int) -> RunConfig:
    """Describes steps of 16 windows of 128 tokens."""
    return RunConfig(
        output_dir="unused",
        model=ModelConfig(path=model),
        data=DataConfig(window=128),
        prune=prune,
        train=TrainConfig(
            steps=steps, global_batch_size=16, micro_batch_size=4, learning_rate=1e-4
        ),
        evaluate=EvaluateConfig(window=128, max_windows=1),
    )


def flops_per_token(shape: ModelShape, window: int) -> float:
    """Counts multiply-adds of a forward pass times two: linears, head, and attention over half the window."""
    attention = sum(x.queries * shape.head_dim * window for x in shape.attention)
    return 2 * (shape.linear_numel() + shape.vocab_size * shape.hidden_size + attention)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--steps", type=int, default=8, help="rounds that are timed, after one that is not"
    )
    parser.add_argument("--model", default="embedded")
    arguments = parser.parse_args()
    prune = PruneConfig(
        ratio=0.5, channel_multiple=1, prune_every=1, warmup_fraction=0, cooldown_fraction=0
    )
    config = short_run(arguments.model, prune, 4 * arguments.steps + 8)
    silence_libraries()
    comm = run_engine(sharded=True).start_ranks()
    prepared = prepare(config, comm)
    dense, small = Timed(prepared), Timed(prepared)
    config_int8 = replace(config, model=replace(config.model, frozen="int8"))
    int8 = Timed(prepare(config_int8, comm))
    small.timed_step(scoring=True)
    pruner = small.pruning.pruner
    # all in one cut: the largest there is
    pruner.schedule = replace(pruner.schedule, start=0, end=1)
    cut_record = small.pruning.cut()
    assert cut_record is not None
    kinds = {
        "plain": (dense, False),
        "scoring": (dense, True),
        "pruned": (small, False),
        "int8": (int8, False),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(arguments.steps + 1):
        for name, (trainer, scoring) in kinds.items():
            times[name].append(trainer.timed_step(scoring=scoring))
    after_cut = times["pruned"][0]  # the first step that the smaller model makes
    timed = {name: values[1:] for name, values in times.items()}
    median = {name: statistics.median(values) for name, values in timed.items()}
    flops = [flops_per_token(t.model.shape, config.data.window) for t in (dense, small)]
    result = {
        "seconds_per_step": median,
        "all_seconds": timed,
        "scoring_over_plain": median["scoring"] / median["plain"],
        "pruned_over_dense": median["pruned"] / median["plain"],
        "pruned_over_dense_flops": flops[1] / flops[0],
        "int8_over_plain": median["int8"] / median["plain"],
        "cut_seconds": cut_record.seconds,
        "cut_over_step": cut_record.seconds / median["plain"],
        "step_after_cut_seconds": after_cut,
        "cut_and_step_after_over_step": (cut_record.seconds + after_cut - median["pruned"])
        / median["plain"],
        "weight_bytes_per_rank": {
            name: trainer.pruning.weight_bytes
            for name, trainer in (("dense", dense), ("pruned", small))
        },
        "tokens_per_step": config.train.global_batch_size * config.data.window,
        "world_size": dense.model.world_size,
        "config": config.to_dict(),
    }
    if comm.rank == 0:
        record("step_time", result, device_name())
    stop_ranks()


if __name__ == "__main__":
    main()
