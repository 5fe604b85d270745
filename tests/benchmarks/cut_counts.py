"""Counts the cuts of the shipped schedules by `prune.channel_multiple`, and how wide the MLP is between them.

    python -m tests.benchmarks.cut_counts

The steps are those of two epochs of LaMini-instruction, as in `launch/configs/llama-*.yaml`. No weight is read. The
seconds of a cut were not measured on a GPU: the range is an estimate from host time. The result goes to
tests/benchmarks/results/cut_counts.json.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraprune_ds.config_file import SHIPPED, load_config
from loraprune_ds.files import write_json
from loraprune_ds.plan.request import read_shape
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.ranking import uniform_counts
from loraprune_ds.pruning.schedule import make_schedule
from loraprune_ds.report.provenance import hardware, versions

RESULT = Path(__file__).parent / "results" / "cut_counts.json"
STEPS = 40_312  # 2 epochs of 2,580,000 instructions in batches of 128
MULTIPLES = (1, 64, 128)
SECONDS_OF_A_CUT = (2.0, 5.0)  # host time on a GPU machine, estimated


def simulate(model: str, multiple: int) -> dict[str, Any]:
    """Follows the schedule of one shipped config with another multiple."""
    config = replace(load_config(SHIPPED / "launch" / "configs" / f"{model}.yaml").prune, channel_multiple=multiple)
    limits = make_limits(config, read_shape(model))
    schedule = make_schedule(config, STEPS, limits)
    cuts = schedule.cut_steps()
    widths = [uniform_counts(limits, schedule.target(step), schedule.ratio) for step in cuts]
    lasts = [later - step for step, later in itertools.pairwise([*cuts, STEPS])]  # steps that each width trains for
    odd = sum(steps for steps, width in zip(lasts, widths, strict=True) if width["channels"] % 8)
    return {
        "model": model,
        "channel_multiple": multiple,
        "points_of_the_schedule": len(replace(schedule, passed_over=frozenset()).cut_steps()),
        "cuts": len(cuts),
        "steps_with_a_width_that_8_does_not_divide": odd / sum(lasts),
        "heads": widths[-1]["heads"],
        "channels": widths[-1]["channels"],
        "estimated_hours_of_cuts": [seconds * len(cuts) / 3600 for seconds in SECONDS_OF_A_CUT],
    }


def main() -> None:
    rows = [simulate(model, multiple) for model in ("llama-7b", "llama-65b") for multiple in MULTIPLES]
    facts = {"steps": STEPS, "estimated_seconds_of_a_cut": SECONDS_OF_A_CUT}
    write_json(RESULT, {"rows": rows, **facts, "versions": versions(), "hardware": hardware("none")})
    for row in rows:
        print(
            f"{row['model']:<10}{row['channel_multiple']:>5}{row['points_of_the_schedule']:>7}{row['cuts']:>7}"
            f"{row['steps_with_a_width_that_8_does_not_divide']:>8.1%}{row['heads']:>4}{row['channels']:>7}"
        )


if __name__ == "__main__":
    main()
