"""Results of runs and evaluations are compared in a table and a picture."""

import json
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.checkpoint.layout import State, Status, write_status
from loraprune_ds.cli.compare import (
    ComparedModel,
    Value,
    comparison_table,
    draw_comparison,
    read_results,
)
from tests.support.evaluations import EVALUATION
from tests.support.refusals import must_name


def run_report(
    criterion: str, removed: float, perplexity: float | None, **data: Any
) -> dict[str, Any]:
    given = {
        "path": "embedded",
        "name": None,
        "split": "train",
        "held_out": None,
        "held_out_fraction": 0.1,
    }
    return {
        "params": {
            "dense": 1000,
            "pruned": round(1000 * (1 - removed)),
            "removed_fraction": removed,
        },
        "perplexity": {"dense": 18.0, "after_last_cut": 90.0, "pruned": perplexity},
        "shelf": [],
        "config": {
            "model": {"dtype": "bfloat16"},
            "data": given | data,
            "prune": {"criterion": criterion, "ranking": "uniform"},
            "evaluate": {"window": 128, "max_windows": 64, "batch_size": 8, "every": None},
        },
    }


def written(share: float) -> dict[str, Any]:
    return {"reasoning_gym:gcd": {"exact_match,none": share, "score,none": 0.9}}


def write_run(folder: Path, report: dict[str, Any], state: State = "finished") -> Path:
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report))
    write_status(folder, Status(state, 3, 8))
    return folder


def write_evaluation(path: Path, result: dict[str, Any]) -> Path:
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        write_evaluation(tmp_path / "b.json", EVALUATION),
        write_run(tmp_path / "magnitude", run_report("magnitude", 0.4, 45.0)),
        write_run(tmp_path / "lora", run_report("lora", 0.2, 27.0)),
    ]


def test_a_run_and_an_evaluation_are_read_as_the_same_thing(paths: list[Path]) -> None:
    lora, magnitude, evaluated = read_results(paths)
    assert lora == ComparedModel(
        name="lora",
        method="lora, uniform",
        parameters=800,
        removed_fraction=0.2,
        measured={
            "perplexity": Value(
                27.0, 18.0, "a held-out 10 % of embedded, first 64 windows of 128, bfloat16"
            )
        },
    )
    assert (magnitude.name, magnitude.method) == ("magnitude", "magnitude, uniform")
    assert evaluated == ComparedModel(
        name="b",
        method=None,
        parameters=750,
        removed_fraction=0.25,
        measured={
            "accuracy": Value(0.6, 0.8, "piqa, boolq"),
            "perplexity": Value(60.0, 50.0, "wikitext2 test, windows of 128, float32"),
        },
    )
    first, second = comparison_table([lora, magnitude, evaluated]).split("\n\n")
    assert [line.split()[0] for line in first.splitlines()[2:]] == ["lora", "magnitude"]
    # The column of methods is empty, so it is left out.
    assert second.splitlines()[-1].split() == "b 750 25.00 % 60.00 50.00 1.20 0.6000 0.8000".split()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"held_out_fraction": 0.25}, "a held-out 25 % of embedded"),
        ({"held_out": "c.txt"}, "c.txt"),
        (
            {"path": [{"path": "a", "split": None}, {"path": "b", "split": "test"}]},
            "a held-out 10 % of a + b test",
        ),
    ],
)
def test_the_held_out_text_is_named(data: dict[str, Any], text: str, tmp_path: Path) -> None:
    (model,) = read_results([write_run(tmp_path / "run", run_report("lora", 0.2, 27.0, **data))])
    assert model.text.partition(",")[0] == text


def test_a_lost_model_is_in_the_table_and_not_in_the_picture(tmp_path: Path) -> None:
    results = read_results([write_run(tmp_path / "lost", run_report("random", 0.9, None))])
    assert "lost" in comparison_table(results)
    must_name("draw", draw_comparison, tmp_path / "picture.png", results)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: p / "nothing.json", "nothing.json"),
        (lambda p: write_run(p / "r", run_report("lora", 0.1, 9.0), "running"), "r"),
        (lambda p: write_run(p / "r", {"params": {}}), "r/report.json"),
        (lambda p: write_evaluation(p / "e.json", {"a": 1}), "e.json"),
        (lambda p: p, "status.json"),
    ],
)
def test_what_is_no_result_is_named(tmp_path: Path, make: Any, named: str) -> None:
    must_name(f"{tmp_path}/{named}", read_results, [make(tmp_path)])


def test_answers_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    old = {"tokens": 9.0, "ended": 0.5, "repetition": 0.25, "dense_perplexity": 3.0}
    plan = {"name": "default", "sha256": "0", "max_new_tokens": 128}
    for name, greedy in (("old", old), ("new", old | {"empty": 0.125})):
        answers = {"answers": {"greedy": greedy, "closeness": None}}
        dense = EVALUATION["dense"] | answers
        write_evaluation(
            tmp_path / f"{name}.json", EVALUATION | answers | {"dense": dense, "answers_plan": plan}
        )
    table = comparison_table(read_results([tmp_path / "old.json", tmp_path / "new.json"]))
    *_, new, earlier = table.splitlines()
    assert new.split()[-6:] == ["12.5", "%", "12.5", "%", "3.00", "3.00"]
    assert earlier.split()[-4:] == ["-", "-", "3.00", "3.00"]


# The picture


def test_written_answers_have_their_own_column(tmp_path: Path) -> None:
    """They are never averaged with multiple choice. A run has them under `after`."""
    pruned, dense = (
        {"results": {"piqa": {"acc,none": 0.5}, **written(share)}} for share in (0.1, 0.3)
    )
    report = run_report("lora", 0.2, 27.0) | {"after": {"tasks": pruned, "dense": {"tasks": dense}}}
    given = EVALUATION | {"tasks": {"results": written(0.2)}, "dense": None}
    results = read_results(
        [write_run(tmp_path / "run", report), write_evaluation(tmp_path / "e.json", given)]
    )
    table = comparison_table(results)
    assert "accuracy   dense  exact match   dense" in table
    assert table.splitlines()[2].split()[-4:] == ["0.5000", "0.5000", "0.1000", "0.3000"]
    assert table.splitlines()[-1].split()[-1] == "0.2000"
    draw_comparison(tmp_path / "pictures" / "p.png", results)
    assert (tmp_path / "pictures" / "p.png").exists()
    must_name("--picture picture.xyz", draw_comparison, tmp_path / "picture.xyz", results)
