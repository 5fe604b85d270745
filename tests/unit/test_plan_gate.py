"""Plans every recorded run of `plan_measured.py` and `wide_layers.py` again, and compares the largest peaks.

What a process held beside its state when a step began (Python's objects, kernels) is added to the plan.
"""

from pathlib import Path

import pytest

from loraprune_ds.files import read_json
from tests.benchmarks.plan_measured import HIGHEST, LOWEST, RESULT, cases, peaks, save_1b_config
from tests.benchmarks.wide_layers import RESULT as WIDE
from tests.benchmarks.wide_layers import wide_peaks


@pytest.mark.parametrize("name", sorted(read_json(RESULT)))
def test_the_peaks_of_a_recorded_run_are_planned(tmp_path: Path, name: str) -> None:
    save_1b_config(tmp_path / "1b")
    model, ranks = name.split(", ")
    request = cases(model, tmp_path).request(int(ranks.split()[0]))
    check(peaks(request, read_json(RESULT)[name]["ranks"]))


@pytest.mark.parametrize("name", [name for name in sorted(read_json(WIDE)) if name != "bin"])
def test_the_peaks_of_true_widths_are_planned(tmp_path: Path, name: str) -> None:
    check(wide_peaks(name, tmp_path, read_json(WIDE)[name]["ranks"]))


def check(found: dict[str, tuple[int, int]]) -> None:
    assert list(found) == ["before", "after"]
    for when, (planned, measured) in found.items():
        assert LOWEST <= planned / measured <= HIGHEST, (when, planned, measured)
