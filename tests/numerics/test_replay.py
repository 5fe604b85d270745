"""What a refit by repeated passes costs on ZeRO-3 ranks."""

from pathlib import Path

from tests.support import replaying
from tests.support.driver import tiny_job
from tests.support.ranks import RankPool

PRUNE = {"ratio": 0.2, "prune_every": 1, "warmup_fraction": 0.5, "compensate": "least_squares"}
PRUNE |= {"protected_first": 0, "protected_last": 0}


def test_weights_are_gathered_once_for_all_passes(ranks: RankPool, tmp_path: Path) -> None:
    job = tiny_job(tmp_path, PRUNE, steps=6)
    once, twice = ranks.run(2, replaying.gathers_of_replays, job, [0], [0, 3, 4, 5])[0]
    assert once == twice
