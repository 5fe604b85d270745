"""The picture of the router's load shows the records, by the experts of the dense model."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.report import router_picture
from loraprune_ds.report.records import EvaluationName, EvaluationRecord, History
from loraprune_ds.report.router_picture import draw_router_load, load
from tests.families import tiny_config
from tests.unit.run_records import DENSE, small_run

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib only warns when a layout collapses


def test_the_load_is_1_where_all_are_chosen_alike() -> None:
    strip = load([4, 4, 8], [0, 2, 3], 5)
    assert [strip[i] for i in (0, 2, 3)] == [0.75, 0.75, 1.5]
    assert math.isnan(strip[1])
    assert math.isnan(strip[4])


def record(name: EvaluationName, choices: list[list[int]]) -> EvaluationRecord:
    return EvaluationRecord(0, name, 5.0, 10, 1, choices)


def test_a_strip_per_layer_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    save = router_picture.save_picture
    monkeypatch.setattr(
        router_picture, "save_picture", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    shape = shape_from_config(tiny_config("mixtral", num_local_experts=4).to_dict(), "somewhere")
    kept = [LayerKeep(heads=torch.arange(5), experts=torch.tensor(experts)) for experts in ([1, 2, 3], [0, 1, 3])]
    before, after = [[3, 3, 3, 3], [6, 2, 2, 2]], [[2, 2, 8], [4, 4, 4]]
    history = History(evaluations=[record("dense", before), record("after_last_cut", after)])
    draw_router_load(tmp_path / "router_load.png", shape, kept, history)
    assert (tmp_path / "router_load.png").read_bytes().startswith(b"\x89PNG")
    dense, pruned = (axes.get_images()[0].get_array() for axes in figures[0].axes[:2])
    assert dense.tolist() == [[1, 1, 1, 1], [2, pytest.approx(2 / 3), pytest.approx(2 / 3), pytest.approx(2 / 3)]]
    assert pruned.filled(-1).tolist() == [[-1, 0.5, 0.5, 2], [1, 1, -1, 1]]


def test_a_run_without_experts_has_no_such_picture(tmp_path: Path) -> None:
    kept = [LayerKeep(heads=torch.arange(4), channels=torch.arange(96)) for _ in DENSE.layers]
    draw_router_load(tmp_path / "router_load.png", DENSE, kept, small_run())
    assert not list(tmp_path.iterdir())
