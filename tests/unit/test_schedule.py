"""When to cut and how much: the cubic schedule against the oracle's."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis.strategies import integers

from loraprune_ds.config import PruneConfig, TrainConfig
from loraprune_ds.config_file import config_from_dict, read_config
from loraprune_ds.config_types import Ranking
from loraprune_ds.pretrained.read_shape import read_model_config, shape_from_config
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import Schedule, make_schedule
from loraprune_ds.train.optimizer import learning_rate_factor
from tests.oracle.formula import cubic_target
from tests.support.launching import ROOT
from tests.support.properties import REPEATABLE
from tests.support.refusals import must_name
from tests.support.shapes_and_scores import LLAMA_7B


def schedule_of(config: PruneConfig, steps: int) -> Schedule:
    """The schedule on a model so large that each cut changes a width."""
    config = replace(config, channel_multiple=1)
    return make_schedule(make_goal(config, LLAMA_7B), steps)


def test_target_is_the_oracles_where_the_borders_are_whole_steps() -> None:
    for steps in (10, 40, 100, 260):
        schedule = schedule_of(PruneConfig(ratio=0.4), steps)
        for step in range(steps + 1):
            assert schedule.target(step) == pytest.approx(
                cubic_target(step, steps, 0.4, 0.1, 0.1), abs=1e-12
            )


@example(100, 29, 29)  # 0.29 · 100 is 28.999999999999996
@given(integers(5, 300), integers(0, 49), integers(0, 49))
@settings(REPEATABLE, max_examples=200)
def test_borders_fall_on_the_right_step_for_any_fraction(
    steps: int, warmup: int, cooldown: int
) -> None:
    """Rounding may not move the step at which a target leaves or arrives. Fractions are in per cent."""
    config = PruneConfig(ratio=0.5, warmup_fraction=warmup / 100, cooldown_fraction=cooldown / 100)
    schedule = schedule_of(config, steps)
    for step in range(steps + 1):
        assert (schedule.target(step) > 0) == (100 * step > warmup * steps)
        assert (schedule.target(step) == 0.5) == (100 * step >= (100 - cooldown) * steps)


@pytest.mark.parametrize(
    ("steps", "every", "cuts"),
    [
        (40, 4, [8, 12, 16, 20, 24, 28, 32, 36]),
        # the last one where the cool-down begins, whatever the rhythm
        (40, 5, [9, 14, 19, 24, 29, 34, 36]),
        (100, 10, [20, 30, 40, 50, 60, 70, 80, 90]),
        (100, 1000, [90]),
        (10, 1, [2, 3, 4, 5, 6, 7, 8, 9]),
        (5, 1, [1, 2, 3, 4, 5]),  # a tenth of five steps is none
    ],
)
def test_cut_steps(steps: int, every: int, cuts: list[int]) -> None:
    schedule = schedule_of(PruneConfig(prune_every=every), steps)
    assert (
        schedule.cut_steps == [step for step in range(2 * steps) if schedule.is_cut(step)] == cuts
    )


@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize(("name", "most"), [("llama-7b", 80), ("llama-65b", 200)])
def test_the_shipped_configs_cut_seldom_and_each_cut_changes_a_width(
    name: str, most: int, ranking: Ranking
) -> None:
    run = config_from_dict(read_config(ROOT / f"launch/configs/paper/{name}.yaml"))
    config = replace(run.prune, ranking=ranking)
    shape = shape_from_config(read_model_config(name), name)
    schedule = make_schedule(make_goal(config, shape), 40_312)
    cuts = schedule.cut_steps
    assert 30 < len(cuts) <= most
    if ranking == "global":
        assert cuts[-1] == schedule.end
        return
    counts = [schedule.goal.counts_at(schedule.fraction(step)) for step in (0, *cuts)]
    assert all(now != before for before, now in pairwise(counts))
    assert (schedule.goal.equal_counts, schedule.limits.most) == (counts[-1], counts[0])
    assert all(layer["channels"] % 128 == 0 for layer in counts)
    due = [
        step
        for step in range(schedule.start + 1, schedule.end + 1)
        if (step - schedule.start) % 10 == 0
    ]
    # no width of the schedule is left out
    assert all(schedule.goal.counts_at(schedule.fraction(step)) in counts for step in due[::50])


def test_a_ratio_that_changes_no_width_and_a_run_too_short_to_cut_are_refused() -> None:
    config = PruneConfig(ranking="uniform", ratio=1e-4, channel_multiple=128)
    must_name(
        "prune.ratio 0.0001 prune.channel_multiple 128",
        make_schedule,
        make_goal(config, LLAMA_7B),
        100,
    )
    config = PruneConfig(warmup_fraction=0.5, cooldown_fraction=0.49)
    assert schedule_of(config, 1).cut_steps == [1]
    config = replace(config, cooldown_fraction=0.5 - 1e-15)
    must_name("train.steps prune.warmup_fraction", schedule_of, config, 100_000_000)


def test_the_learning_rate_warms_up_once_and_falls_in_each_cycle() -> None:
    config = TrainConfig(steps=10, warmup_steps=2, lr_scheduler="linear")
    factors = [learning_rate_factor(config, [6, 4], step) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 1, 0.75, 0.5, 0.25])
    config = replace(config, lr_scheduler="cosine")
    assert learning_rate_factor(config, [6, 4], 4) == pytest.approx(0.5)


def test_every_step_up_to_the_last_cut_scores() -> None:
    schedule = schedule_of(PruneConfig(prune_every=3), 10)
    assert schedule.cut_steps == [4, 7, 9]
    assert [step for step in range(1, 11) if schedule.is_cut(step)] == [4, 7, 9]
    assert [step for step in range(1, 11) if schedule.is_scored(step)] == list(range(1, 10))
    config = PruneConfig(ranking="uniform", ratio=0.01, channel_multiple=128)
    seldom = make_schedule(make_goal(config, LLAMA_7B), 100)  # the last steps change no width
    assert 10 < seldom.last_cut < 90
    assert [step for step in range(1, 101) if seldom.is_scored(step)] == list(
        range(1, seldom.last_cut + 1)
    )
