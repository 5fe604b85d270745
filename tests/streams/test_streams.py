"""Two ranks on virtual cards: a wait that is written down orders all accesses to the same memory."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.streams.deepspeed_on_card import start_on_card
from tests.streams.scenarios import make_job, prune_alone, prune_mended, prune_outside, watch
from tests.support.families import heavy
from tests.support.ranks import RankPool

GATHER = "partition_parameters.py _all_gather_dtype"
# zero/README.md
DEEPSPEEDS_OWN = ("stage3.py _reassign_or_swap_out_partitioned_parameters", GATHER)
UPDATE = "sharded.py act_and_step"
FETCH = "partitioned_param_coordinator.py _fetch_sub_module_impl"
REDUCE = "stage3.py independent_gradient_partition_epilogue"


@pytest.fixture(scope="module")
def cards() -> Iterator[RankPool]:
    pool = RankPool(start_on_card, fresh=True)
    yield pool
    pool.close()


def races(
    cards: RankPool, scenario: Callable[..., None], job: Any, *without: str
) -> set[tuple[str, ...]]:
    """Returns the functions of the two accesses of each report, as "file.py function"."""
    reports = set().union(*cards.run(2, watch, scenario, job, without))
    print(*(f"{first}\n    {second}" for first, second in reports), sep="\n")  # noqa: T201  # seen if the test fails
    return {tuple(re.sub(r":\d+", "", access.site[0]) for access in report) for report in reports}


@pytest.mark.parametrize("kind", ["overlap", heavy("hpZ"), heavy("offload")])
def test_our_trainer_orders_all_accesses(cards: RankPool, tmp_path: Path, kind: str) -> None:
    assert races(cards, prune_alone, make_job(tmp_path, kind)) == set()


def test_another_trainer_does_too(cards: RankPool, tmp_path: Path) -> None:
    assert races(cards, prune_outside, make_job(tmp_path)) == set()


def test_a_missing_wait_of_ours_is_reported(cards: RankPool, tmp_path: Path) -> None:
    found = races(
        cards, prune_alone, make_job(tmp_path), "params.py shard_at_birth", "sharded.py cut"
    )
    assert {("params.py _zero_parameter", GATHER), ("cut.py _by_tensor", GATHER)} <= found


def test_a_missing_wait_of_deepspeed_is_reported(cards: RankPool, tmp_path: Path) -> None:
    found = races(cards, prune_alone, make_job(tmp_path), FETCH, REDUCE)
    assert ("partition_parameters.py wait", "lora_product.py forward") in found
    assert ("stage3.py partition_grads", "sharded.py gradient_norm") in found


@pytest.mark.heavy
def test_the_race_of_deepspeed_is_found_and_its_mend_is_enough(
    cards: RankPool, tmp_path: Path
) -> None:
    job = make_job(tmp_path)
    assert races(cards, prune_outside, job, UPDATE) == {DEEPSPEEDS_OWN}
    assert races(cards, prune_mended, job, UPDATE) == set()
