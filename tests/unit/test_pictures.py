"""The pictures show the records: curves, strips, bars and labels are read back from the figure."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.report.pictures import draw_kept_groups, draw_training
from loraprune_ds.report.records import EvaluationRecord, History
from tests.unit.run_records import DENSE, small_run, step_record

Counts = Sequence[tuple[int, int]]  # of heads and channels, per layer
pytestmark = pytest.mark.filterwarnings("error")  # matplotlib only warns when a layout collapses


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures as they were saved."""
    saved: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **more: saved.append(self) or save(self, *args, **more))
    return saved


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def curve(axes: Any, label: str) -> tuple[list[float], list[float]]:
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def kept_of(shape: ModelShape, counts: Counts) -> list[LayerKeep]:
    """The last groups of each layer."""
    return [
        LayerKeep(heads=torch.arange(layer["heads"] - heads, layer["heads"]), channels=torch.arange(channels))
        for layer, (heads, channels) in zip(shape.counts, counts, strict=True)
    ]


def test_kept_groups_has_a_strip_per_layer_and_kind(tmp_path: Path, figures: list[Any]) -> None:
    draw_kept_groups(tmp_path / "run" / "kept_groups.png", DENSE, kept_of(DENSE, [(4, 96), (2, 40), (3, 50)]))
    assert is_png(tmp_path / "run" / "kept_groups.png")
    heads, head_counts, channels, channel_counts = figures[0].axes
    assert heads.get_images()[0].get_array().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]
    strips = channels.get_images()[0].get_array()
    assert strips.shape == (3, 96)
    assert strips[1].tolist() == [1] * 40 + [0] * 56
    for axes, had, kept in ((head_counts, [4, 4, 4], [4, 2, 3]), (channel_counts, [96, 96, 96], [96, 40, 50])):
        dense_bars, kept_bars = axes.containers
        assert [bar.get_width() for bar in dense_bars] == had
        assert [bar.get_width() for bar in kept_bars] == kept


def test_training_shows_loss_cuts_and_perplexities(tmp_path: Path, figures: list[Any]) -> None:
    draw_training(tmp_path / "training.png", small_run())
    assert is_png(tmp_path / "training.png")
    loss, sparsity, seconds, _, memory, perplexity = figures[0].axes
    assert curve(loss, "training") == (list(range(1, 11)), [3.0] * 10)
    perplexities = [51.59, 103.2, 80.0, 74.23]
    assert curve(loss, "held-out text") == ([0, 6, 8, 10], [math.log(p) for p in perplexities])
    (line,) = perplexity.get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 29.7, 29.7, 29.7], perplexities)
    assert curve(sparsity, "target")[0] == [4, 6]
    assert list(seconds.get_lines()[0].get_xdata()) == list(range(2, 11))  # without the warm-up
    assert memory.get_lines()[0].get_ydata()[0] == pytest.approx(5.1, abs=1e-6)  # the fullest rank


# Perplexities after each of 10 cuts, the dense model's first. Then the exported model's.
def test_pictures_of_odd_runs_are_drawn(tmp_path: Path, figures: list[Any]) -> None:
    """Nothing happened yet; one step with a lost loss and a model that fell apart."""
    odd = History(steps=[step_record(1, loss=math.nan)], evaluations=[EvaluationRecord(1, "pruned", math.inf, 1, 1)])
    for name, history in (("empty", History()), ("odd", odd)):
        draw_training(tmp_path / f"{name}.png", history)
        assert is_png(tmp_path / f"{name}.png")
        assert len(figures[-1].axes) == 5  # an infinite perplexity has no place on an axis
