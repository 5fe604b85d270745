"""report.json, kept_groups.json and the final table say what the records say."""

import json
import math
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraprune_ds.cli.run import summary_table
from loraprune_ds.config import PruneConfig, RunConfig
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import make_schedule
from loraprune_ds.report.measured import MEASURES, Value
from loraprune_ds.report.pictures import draw_kept_groups, draw_training
from loraprune_ds.report.records import EvaluationRecord, History
from loraprune_ds.report.report import (
    RESULTS,
    Outcome,
    commit,
    make_report,
    write_kept_groups,
    write_results,
)
from loraprune_ds.units import format_change, format_count
from tests.support.run_records import DENSE, PRUNED, small_run, step_record
from tests.support.shapes_and_scores import keep_of

SCHEDULE = make_schedule(make_goal(PruneConfig(ratio=0.375, channel_multiple=1), DENSE), 10)


def report_of(
    history: History, resumed_from: tuple[int, ...] = (), pruned: ModelShape = PRUNED, **data: Any
) -> dict[str, Any]:
    config = RunConfig(output_dir="runs/x", seed=7).to_dict()
    config["data"] |= data
    config["evaluate"] |= {"window": 128, "max_windows": 64}
    return make_report(
        Outcome(config, history, SCHEDULE, pruned, [], list(resumed_from), "cpu", [11, 12])
    )


def test_a_report_has_what_a_run_of_one_start_does_not_show(tmp_path: Path) -> None:
    report = report_of(small_run(), resumed_from=(5,))
    assert report["asked_ratio"] == 0.375
    assert "prune.ratio: 37.5 % of" in summary_table(report, tmp_path)
    assert report["resumed_from"] == [5]
    assert report["peak_memory_bytes"] == [11, 12]
    assert report["prune_steps"][1] == {
        "step": 6,
        "target": pytest.approx(0.3),
        "reached": 0.297,
        "removed_fraction": 0.297 * 0.8,
        "seconds": 1.234,
        "bytes_sent": 3_400_000,
        "weight_bytes_before": [101_200_000, 101_199_900],
        "weight_bytes_after": [90_000_000, 89_999_900],
    }
    # PyPI's metadata leaves out the build, which torch names itself: 2.13.0 and 2.13.0+cu130.
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["hardware"]["accelerator"] == "cpu"
    assert "0 steps, 0 cuts, 2 ZeRO-3 ranks" in summary_table(report_of(History()), tmp_path)


def test_the_second_run_of_a_chain_tells_what_is_gone_of_the_first_dense_model() -> None:
    own = report_of(small_run())
    parameters = 2 * DENSE.total_numel()
    first = {"name": "dense", "parameters": parameters, "linear_parameters": 3}
    start = replace(DENSE, config=SimpleNamespace(**vars(DENSE.config), loraprune_first=first))
    schedule = make_schedule(make_goal(SCHEDULE.goal.config, start), 10)
    outcome = Outcome(own["config"], small_run(), schedule, PRUNED, [], [], "cpu", [11, 12])
    report = make_report(outcome)
    assert report["start"] == own["start"]
    found, values = report["measured"], report["measured"]["values"]
    assert found["removed"] == 1 - PRUNED.total_numel() / parameters
    assert (
        found["method"] == f"{own['measured']['method']}, from {format_count(DENSE.total_numel())}"
    )
    assert (values["parameters"]["dense"], values["linear parameters"]["dense"]) == (parameters, 3)
    of_own = own["measured"]["values"]["perplexity"]
    assert of_own["dense"] is not None
    assert values["perplexity"] == of_own | {"dense": None}
    assert report["perplexity"] == own["perplexity"]


def test_the_final_table_shows_what_decides_first_in_eight_rows(tmp_path: Path) -> None:
    report = report_of(small_run())
    for name in (*MEASURES, "boolq acc"):  # as of evaluate.after
        report["measured"]["values"].setdefault(name, asdict(Value(0.25, 0.5, "b")))
    table = summary_table(report, tmp_path)
    _, rows = table.split("\n\n")[:2]
    head, *lines = rows.splitlines()
    assert head.split() == ["dense", "model", "change"]
    assert [line.split()[0] for line in lines[:4]] == [
        "parameters",
        "perplexity",
        "answers",
        "tokens",
    ]
    numel = [f"{model.total_numel() / 1000:.1f} k" for model in (DENSE, PRUNED)]
    assert f"{numel[0]}  {numel[1]}" in lines[0]
    assert lines[1].split()[1:] == ["51.59", "74.23", "43.9", "%", "more"]
    assert [line.partition(": ")[2] != "" for line in lines] == [False] * 8 + [True] * 2


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"path": "embedded", "held_out_fraction": 0.25}, "a held-out 25 % of embedded"),
        ({"held_out": "c.txt"}, "c.txt"),
        (
            {"path": [{"path": "a", "split": None}, {"path": "b", "split": "test"}]},
            "a held-out 10 % of a + b test",
        ),
    ],
)
def test_the_held_out_text_is_named(data: dict[str, Any], text: str) -> None:
    found = report_of(small_run(), **data)["measured"]
    basis = f"{text}, first 64 windows of 128, bfloat16"
    assert found["values"]["perplexity"] == {"value": 74.23, "dense": 51.59, "basis": basis}


def test_the_later_evaluation_of_a_name_counts_and_infinity_is_valid_json(tmp_path: Path) -> None:
    """A run resumed at its end measures the exported model again."""
    found = [EvaluationRecord(10, "pruned", p, 1, 1) for p in (80.0, 74.0)]
    evaluations = [EvaluationRecord(0, "dense", math.inf, 1, 1), *found]
    write_json(tmp_path / "report.json", report_of(History(evaluations=evaluations)))
    assert read_json(tmp_path / "report.json")["perplexity"] == {
        "dense": None,
        "after_last_cut": None,
        "pruned": 74.0,
    }


def test_a_picture_is_listed_if_it_was_drawn(tmp_path: Path) -> None:
    kept = keep_of([([0, 1, 2, 3], [0, 5]), ([2], [95]), ([1, 3], [7])])
    outcome = Outcome({"seed": 0}, small_run(), SCHEDULE, PRUNED, kept, [], "cpu", [1])
    pictures = write_results(tmp_path, outcome)
    assert sorted(pictures) == sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 2


def test_kept_groups_are_indices_into_the_dense_model_and_stable(tmp_path: Path) -> None:
    kept = keep_of([([0, 1, 2, 3], [0, 5]), ([2], [95]), ([1, 3], [7])])
    write_kept_groups(tmp_path, kept, DENSE)
    text = (tmp_path / "kept_groups.json").read_text()
    assert json.loads(text)["layers"][1] == {
        "heads": [2],
        "heads_dense": 4,
        "channels": [95],
        "channels_dense": 96,
    }
    assert (
        text.splitlines()[2]
        == '{"channels": [95], "channels_dense": 96, "heads": [2], "heads_dense": 4},'
    )
    assert len(text.splitlines()) == 3 + 2  # a line per layer
    write_kept_groups(tmp_path / "again", kept, DENSE)
    assert (tmp_path / "again" / "kept_groups.json").read_bytes() == text.encode()


def test_a_commit_is_that_of_its_own_checkout_and_dirty_if_a_file_but_no_result_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    result, code = tmp_path / RESULTS / "speed.json", tmp_path / "code.py"
    result.parent.mkdir(parents=True)
    for path in (result, code):
        path.write_text("1")
    (tmp_path / ".git").mkdir()
    assert commit(tmp_path) is None  # not a repository
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    result.write_text("2")
    assert commit(tmp_path) == head
    assert commit(result.parent) is None  # as an installed copy inside another repository
    code.write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None  # no git


pytestmark = pytest.mark.filterwarnings("error")  # matplotlib only warns when a layout collapses


def test_pictures_of_all_runs_are_drawn(tmp_path: Path) -> None:
    """Also where nothing happened yet, and of one step with a lost loss and a model that fell apart."""
    odd = History(
        steps=[step_record(1, loss=math.nan)],
        evaluations=[EvaluationRecord(1, "pruned", math.inf, 1, 1)],
    )
    for number, history in enumerate((small_run(), History(), odd)):
        path = tmp_path / f"{number}.png"
        draw_training(path, history)
        assert path.read_bytes().startswith(b"\x89PNG")
    draw_kept_groups(tmp_path / "kept.png", DENSE, keep_of([([0, 1], [*range(96)])] * 3))
    assert (tmp_path / "kept.png").exists()


def test_numbers_are_written_for_people() -> None:
    assert format_count(2e15) == "2000.0 T"
    assert [format_change(4, after) for after in (3, 4, 5)] == [
        "25.0 % less",
        "unchanged",
        "25.0 % more",
    ]
