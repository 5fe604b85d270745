"""How many steps the quickstart makes: as many as take ten minutes, and as many as the run began with."""

import sys
from pathlib import Path

import pytest

from launch import quickstart_steps


@pytest.mark.parametrize(("product", "steps"), [(quickstart_steps.PRODUCT, 50), (10 * quickstart_steps.PRODUCT, 20)])
def test_a_slow_cpu_makes_fewer_steps(
    product: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart_steps, "product_seconds", lambda: product)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    quickstart_steps.main()
    told = capsys.readouterr()
    assert told.out == f"{steps}\n"
    assert told.err.startswith("expected: ")
    assert ("instead of 50" in told.err) == (steps < 50)

    (tmp_path / "config.yaml").write_text("train: {steps: 30}")  # of a start on another machine
    quickstart_steps.main()
    assert capsys.readouterr().out == "30\n"


def test_the_product_takes_some_time() -> None:
    assert 0 < quickstart_steps.product_seconds() < 10
