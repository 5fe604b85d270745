"""The pictures show the records: curves, bars and labels are read back from the figure."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.report import pictures
from loraprune_ds.report.pictures import draw_kept_groups, draw_training
from loraprune_ds.report.records import EvaluationRecord, History
from tests.unit.run_records import DENSE, PRUNED, small_run, step_record

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib only warns when a layout collapses


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures as they were saved."""
    saved: list[Any] = []
    save = pictures._save

    def save_and_keep(figure: Any, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(pictures, "_save", save_and_keep)
    return saved


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def curve(axes: Any, label: str) -> tuple[list[float], list[float]]:
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def test_kept_groups_has_a_bar_per_layer_and_kind(tmp_path: Path, figures: list[Any]) -> None:
    draw_kept_groups(tmp_path / "run" / "kept_groups.png", DENSE, PRUNED)
    assert is_png(tmp_path / "run" / "kept_groups.png")
    heads, channels = figures[0].axes
    for axes, had, kept in ((heads, [4, 4, 4], [4, 2, 3]), (channels, [96, 96, 96], [96, 40, 50])):
        dense_bars, kept_bars = axes.containers
        assert [bar.get_height() for bar in dense_bars] == had
        assert [bar.get_height() for bar in kept_bars] == kept
    assert heads.get_title("left") == "Key-value heads: 9 of 12 kept (75 %)"


def test_eighty_layers_keep_their_bars_apart(tmp_path: Path, figures: list[Any]) -> None:
    dense = DENSE.with_layers((LayerShape(heads=64, channels=22016),) * 80)
    draw_kept_groups(
        tmp_path / "kept_groups.png", dense, dense.with_layers((LayerShape(heads=30, channels=9000),) * 80)
    )
    axes = figures[0].axes[1]
    first, second = (bar.get_window_extent() for bar in axes.containers[1][:2])
    assert first.width >= 3  # pixels
    assert second.x0 - first.x1 >= 1
    labels = [tick.get_window_extent() for tick in axes.get_xticklabels() if tick.get_text()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(labels))


def test_training_shows_loss_cuts_and_perplexities(tmp_path: Path, figures: list[Any]) -> None:
    draw_training(tmp_path / "training.png", small_run())
    assert is_png(tmp_path / "training.png")
    loss, sparsity, seconds, weights, memory = figures[0].axes
    assert curve(loss, "training") == (list(range(1, 11)), [3.0] * 10)
    perplexities = [51.59, 103.2, 80.0, 74.23]
    assert curve(loss, "held-out text, with its perplexity") == ([0, 6, 8, 10], [math.log(p) for p in perplexities])
    assert [t.get_text() for t in loss.texts] == ["51.59 dense", "103.20 after the last cut", "74.23 exported"]
    assert curve(sparsity, "target")[0] == [4, 6]
    assert list(seconds.get_lines()[0].get_xdata()) == list(range(2, 11))  # without the warm-up
    assert weights.get_ylabel() == "MB"
    assert memory.get_ylabel() == "GB"
    assert memory.get_lines()[0].get_ydata()[0] == pytest.approx(5.1, abs=1e-6)  # the fullest rank
    for axes in figures[0].axes:
        cuts = [
            line.get_xdata()[0]
            for line in axes.get_lines()
            if line.get_color() == pictures.CUT and len(line.get_xdata())
        ]
        assert cuts == [4, 6]


def test_pictures_of_odd_runs_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    """Nothing happened yet; one step with a lost loss and a model that fell apart."""
    odd = History(steps=[step_record(1, loss=math.nan)], evaluations=[EvaluationRecord(1, "pruned", math.inf, 1, 1)])
    for name, history in (("empty", History()), ("odd", odd)):
        draw_training(tmp_path / f"{name}.png", history)
        assert is_png(tmp_path / f"{name}.png")
        assert len(figures[-1].axes[0].texts) == 0  # an infinite perplexity has no place on the axis
