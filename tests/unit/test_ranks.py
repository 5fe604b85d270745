"""The harness that other tests trust: it must name the rank that failed first and never hang."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import RankFailure, RankPool


def no_setup(rank: int, world_size: int, folder: Path) -> None:
    os.environ["RANK"] = str(rank)


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Workers without torch, which start in a tenth of a second: most tests here end them."""
    pool = RankPool(no_setup, fresh=True)
    yield pool
    pool.close()


def my_rank() -> int:
    return int(os.environ["RANK"])


def fail_in_turn(first: int, delay: float) -> None:
    if my_rank() != first:
        time.sleep(delay)
    raise ValueError(f"rank {my_rank()} says no")


def sleep_on(rank: int) -> None:
    if my_rank() == rank:
        time.sleep(60)


def die_on(rank: int) -> None:
    if my_rank() == rank:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
    # what a collective says when a peer dies, here even before it does
    raise ConnectionError("peer is gone")


def test_the_deadline_says_where_every_rank_stood(pool: RankPool) -> None:
    with pytest.raises(RankFailure) as failure:
        pool.run(2, sleep_on, 1, timeout=0.5)
    text = str(failure.value)
    assert text.startswith("no end after 0.5 s\nrank 0 of 2: has finished\n")
    assert "in sleep_on" in text[text.index("rank 1 of 2:") :]


@pytest.mark.parametrize(
    ("size", "function", "arguments", "report"),
    [
        (1, ctypes.string_at, (0,), r"(?s)killed by SIGSEGV.*in string_at"),
        (1, sys.exit, (3,), "SystemExit: 3"),
        (1, threading.Lock, (), r"(?s)rank 0 of 1.*cannot pickle"),
        (
            2,
            fail_in_turn,
            (1, 0.4),
            r"(?s)^rank 1 of 2: .*in fail_in_turn.*ValueError: rank 1 says",
        ),
        (2, die_on, (1,), r"^rank 1 of 2: killed by SIGTERM"),  # even if a peer complains first
    ],
)
def test_every_end_of_a_worker_is_a_failure(
    pool: RankPool, size: int, function: Callable[..., Any], arguments: tuple[Any, ...], report: str
) -> None:
    with pytest.raises(RankFailure, match=report):
        pool.run(size, function, *arguments)
