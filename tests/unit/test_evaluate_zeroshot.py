"""Tasks are found by name, and accuracies are averaged. The integration tests compare the results of lm-eval."""

import importlib.util
from pathlib import Path

import pytest

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate import zeroshot
from loraprune_ds.evaluate.zeroshot import PAPER_TASKS, TaskSettings, check_tasks, mean_accuracy

TASK = "task: my_own\ndataset_path: json\noutput_type: multiple_choice\n"
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


@needs_lm_eval
def test_the_papers_seven_tasks_are_known_under_their_names() -> None:
    assert len(PAPER_TASKS) == 7
    check_tasks(TaskSettings(PAPER_TASKS))
    check_tasks(TaskSettings(("paper", "boolq")))


def test_paper_stands_for_the_seven_and_nothing_runs_twice() -> None:
    assert zeroshot._expand(["lambada", "paper", "boolq"]) == ["lambada", *PAPER_TASKS]


@needs_lm_eval
def test_local_tasks_go_by_name_or_by_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TASK)
    check_tasks(TaskSettings(("my_own",), include_path=tmp_path))
    check_tasks(TaskSettings((str(tmp_path / "mine.yaml"),)))
    with pytest.raises(UserError, match="lm-eval knows no task my_own"):
        check_tasks(TaskSettings(("my_own",)))
    with pytest.raises(UserError, match=r"--include-path: .*nowhere is not a folder"):
        check_tasks(TaskSettings(("my_own",), include_path=tmp_path / "nowhere"))


@needs_lm_eval
def test_a_mistyped_task_is_one_line_with_the_nearest_names() -> None:
    with pytest.raises(UserError) as caught:
        check_tasks(TaskSettings(("piqa", "helaswag")))
    assert str(caught.value).startswith("--tasks: lm-eval knows no task helaswag; did you mean hellaswag")


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        check_tasks(TaskSettings(("piqa",)))
    assert str(caught.value) == "--tasks needs the package lm-eval: pip install 'lm-eval[hf]'"


def test_mean_accuracy_is_over_the_tasks_that_have_one() -> None:
    results = {"a": {"acc,none": 0.5, "acc_norm,none": 0.9}, "b": {"acc,none": 0.25}, "c": {"perplexity,none": 7.0}}
    assert mean_accuracy({"results": results}) == 0.375
    assert mean_accuracy({"results": {"c": results["c"]}}) is None
