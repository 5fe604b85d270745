"""Every connection that a run needs is made before anything of it is loaded."""

import os
from pathlib import Path
from typing import Any

import torch

from tests.integration.launching import fork_ranks, write_config

LOG = "COLLECTIVE_LOG"
NAMES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "gather")


def log_collectives() -> None:
    """Has torch.distributed write down what is called, in order."""
    for name in (*NAMES, "all_gather_object"):
        _log_calls(name)


def _log_calls(name: str) -> None:
    original = getattr(torch.distributed, name)

    def logged(*args: Any, **kwargs: Any) -> Any:
        with open(os.environ[LOG], "a") as log:
            log.write(name + "\n")
        return original(*args, **kwargs)

    setattr(torch.distributed, name, logged)


def test_all_kinds_of_collectives_run_before_the_input_is_looked_at(tmp_path: Path) -> None:
    config = {"output_dir": "out", "train": {"steps": 1, "global_batch_size": 3, "micro_batch_size": 1}}
    arguments = ["--config", str(write_config(tmp_path / "run.yaml", config))]
    logs = [tmp_path / f"log-{rank}" for rank in range(2)]
    ended = fork_ranks(
        arguments,
        tmp_path,
        ranks=2,
        cwd=tmp_path,
        environment=lambda rank: {LOG: str(logs[rank])},
        before=log_collectives,
    )
    assert [rank.code for rank in ended] == [2, 2], ended[0].everything  # 3 samples cannot be split over 2 ranks
    for log in logs:
        called = log.read_text().split()
        assert called[: called.index("all_gather_object")] == list(NAMES)
