"""Measures the seconds of a cut by part: the passes that are repeated, their moments, the refits, and the cut itself.

    deepspeed --quiet --num_accelerators 2 tests/benchmarks/cut_time.py [--model FOLDER]

SmolLM2-135M makes steps of 2,048 tokens until a refit has its ten tokens for each input. Then a cut takes 10 % of the
linear parameters. The result goes to results/cut_time.json, by the number of ranks. CPU seconds are sums over them.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

from loraprune_ds.config import PruneConfig
from loraprune_ds.engines import run_engine
from loraprune_ds.pruning import replay, step
from loraprune_ds.ranks.comm import stop_ranks
from loraprune_ds.ranks.job import silence_libraries
from loraprune_ds.train.prepare import prepare
from tests.benchmarks.running import RESULTS, add_to, make_parser
from tests.benchmarks.step_time import Timed, short_run

STEPS = 8
# part -> where its function is found, and its name
PARTS = {
    "whole refit": (step, "refit_by_replay"),
    "moments": (replay, "add_half_of_product"),
    "solve": (replay, "refit"),
    "halves": (replay, "from_half"),
}


class Clock:
    """Adds up the CPU seconds that calls of functions take on this rank."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                spent = time.process_time() - began
                self.seconds[part] = self.seconds.get(part, 0.0) + spent

        return call


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default="embedded")
    arguments = parser.parse_args()
    prune = PruneConfig(
        ratio=0.1, channel_multiple=1, prune_every=STEPS, warmup_fraction=0, cooldown_fraction=0
    )
    config = short_run(arguments.model, prune, STEPS)
    silence_libraries()
    comm = run_engine(sharded=True).start_ranks()
    timed = Timed(prepare(config, comm))
    of_steps = [timed.timed_step(scoring=True) for _ in range(STEPS)]
    clock = Clock()
    with ExitStack() as stack:
        for part, (module, name) in PARTS.items():
            function = clock.timed(part, getattr(module, name))
            stack.enter_context(patch.object(module, name, function))
        model = type(timed.model)
        stack.enter_context(patch.object(model, "cut", clock.timed("repartition", model.cut)))
        cut = clock.timed("cut", timed.pruning.cut)()
    assert cut is not None
    of_ranks = comm.gather_objects(clock.seconds)
    if comm.rank == 0:
        result = {
            "cut_seconds": cut.seconds,
            "step_seconds": of_steps,
            "cpu_seconds": {part: sum(rank[part] for rank in of_ranks) for part in clock.seconds},
            "config": config.to_dict(),
        }
        add_to(RESULTS / "cut_time.json", f"{comm.world_size} ranks", result)
    stop_ranks()


if __name__ == "__main__":
    main()
