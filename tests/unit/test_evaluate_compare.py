"""Results of runs and evaluations are compared in a table and a picture."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from loraprune_ds.cli.compare import main
from loraprune_ds.files import write_json
from loraprune_ds.report.comparison import draw_comparison
from loraprune_ds.report.measured import Measured, Value, comparison, read_results
from tests.support.evaluations import EVALUATION, HELD_OUT, measured_of
from tests.support.refusals import must_name

WIKITEXT = "wikitext2 test, windows of 128, float32"
TASKS = "piqa (1838), boolq (3270)"
OTHER_TASKS = "piqa (100)"


def write_run(folder: Path, measured: dict[str, Any]) -> Path:
    """Writes what compare reads of a run's folder, or of a callback's, which has no status.json."""
    write_json(folder / "report.json", {"measured": measured, "versions": {"commit": "abc"}})
    return folder


def lora(removed: float, perplexity: float | None, **values: Value) -> dict[str, Any]:
    values["perplexity"] = Value(perplexity, 18.0, HELD_OUT)
    return measured_of("model", removed, **values)


def test_a_run_and_an_evaluation_are_read_as_the_same_thing(tmp_path: Path) -> None:
    write_json(tmp_path / "b.json", EVALUATION)
    run = write_run(tmp_path / "lora-0.2", lora(0.2, 27.0))
    whole, evaluated = read_results([tmp_path / "b.json", run])
    assert whole == Measured(
        "lora-0.2", "lora, uniform", 800, 0.2, {"perplexity": Value(27.0, 18.0, HELD_OUT)}
    )
    assert (evaluated.name, evaluated.method, evaluated.removed) == ("b", None, 0.25)
    assert evaluated.values["perplexity"] == Value(60.0, 50.0, WIKITEXT)


def test_values_on_another_basis_have_columns_of_their_own(tmp_path: Path) -> None:
    given = {
        "a": lora(0.1, 22.0, accuracy=Value(0.5, 0.75, TASKS)),
        "b": lora(0.2, 27.0, accuracy=Value(0.25, 0.5, OTHER_TASKS), tokens_per_second=Value(9.0)),
        "lost": lora(0.9, None),
    }
    found = read_results([write_run(tmp_path / name, one) for name, one in given.items()])
    assert comparison(found).splitlines() == [
        "result  method         parameters  removed  perplexity  dense  accuracy   dense  accuracy   dense",
        "a       lora, uniform         900   10.0 %       22.00  18.00    0.5000  0.7500         -       -",
        "b       lora, uniform         800   20.0 %       27.00  18.00         -       -    0.2500  0.5000",
        "lost    lora, uniform         100   90.0 %  not finite  18.00         -       -         -       -",
        f"perplexity: {HELD_OUT}",
        f"accuracy: {TASKS}",
        f"accuracy: {OTHER_TASKS}",
    ]


@pytest.mark.parametrize(
    ("results", "named"),
    [
        (None, "report.json cannot be read: No such file"),
        ({"params": {}, "versions": {"commit": "8ac16b60"}}, "report.json 8ac16b60 wrote it"),
        ({"measured": []}, "report.json another version"),
        ({"measured": {"name": "a"}}, "report.json another version"),
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, results: Any, named: str) -> None:
    if results is not None:
        write_json(tmp_path / "report.json", results)
    must_name(f"{tmp_path} {named}", read_results, [tmp_path])


def test_a_picture_has_a_panel_for_each_quality_on_each_basis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accuracy = Value(0.5, None, TASKS)
    runs = [
        write_run(tmp_path / "a", lora(0.1, 22.0, accuracy=accuracy)),
        write_run(tmp_path / "b", lora(0.2, 27.0)),
    ]
    picture = tmp_path / "pictures" / "p.png"
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), "--picture", str(picture)])
    assert main() == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("result ")
    monkeypatch.setattr(sys, "argv", ["compare", str(runs[0]), "--json"])
    assert main() == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["values"]["accuracy"] == {"value": 0.5, "dense": None, "basis": TASKS}
    for arguments, words in (
        ([str(write_run(tmp_path / "lost", lora(0.9, None))), "--picture", "p.png"], "draw"),
        ([str(runs[0]), "--picture", "p.xyz"], "--picture p.xyz"),
        ([str(runs[0]), "--picture", "/dev/null/p.png"], "--picture /dev/null/p.png"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *arguments])
        assert main() == 2
        assert words in capsys.readouterr().err


def test_labels_hide_neither_curves_nor_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the points lie side by side."""
    crowded = [
        Measured(f"evaluated{i}", None, 1, 0.2 + i / 500, {"accuracy": Value(0.5, 0.6, TASKS)})
        for i in range(4)
    ]
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    assert draw_comparison(tmp_path / "p.png", crowded)
    (axes,) = drawn[0].axes
    labels = [text.get_window_extent() for text in axes.texts]
    assert len(labels) == 5  # with the dense model's
    points = [line.get_transform().transform(line.get_xydata()) for line in axes.lines]
    for i, label in enumerate(labels):
        assert not label.count_overlaps(labels[:i])
        assert not any(label.contains(x, y) for line in points for x, y in line)
