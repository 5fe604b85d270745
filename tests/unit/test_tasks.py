"""Tasks of reasoning-gym: questions by a seed, greedy answers, the package's own score. And `evaluate.after`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.cli import after
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import RunError
from loraprune_ds.evaluate import tasks
from loraprune_ds.evaluate.settings import TaskSettings
from loraprune_ds.evaluate.tasks import GYM_DEFAULT, GymTask, greedy_answers, load_tasks
from loraprune_ds.files import read_json, write_json
from loraprune_ds.generate.writer import Writer
from tests.oracle.models import make_tiny_llama
from tests.support.one_rank import rank_of
from tests.support.refusals import must_name
from tests.support.texts import make_tokenizer

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is missing"
)
TEMPLATE = "{% for m in messages %}<s> {{ m.content }} </s> {% endfor %}<s> w59"


# Which tasks there are


def of_gym(name: str, **settings: Any) -> TaskSettings:
    return TaskSettings((f"reasoning_gym:{name}",), limit=2, **settings)


def test_without_a_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    must_name("--tasks lm-eval[hf]", tasks.check_tasks, TaskSettings(("piqa",)))
    must_name("--tasks reasoning-gym", tasks.check_tasks, of_gym("chain_sum"))
    local = of_gym("chain_sum", include_path=Path())
    must_name("--include-path reasoning_gym", tasks.check_tasks, local)


@needs_gym
@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("chain_summ", "chain_sum"),
        ("puzzle24", "code"),
        ("ransom_note:easy", "process"),
        ("chain_sum:hard", ":easy"),
        ("gsm_symbolic:easy", "curriculum"),
        ("graph_color", "answer"),
        ("composite", "dataset"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named(name: str, names: str) -> None:
    must_name(f"--tasks {name} {names}", tasks.check_tasks, of_gym(name))


@needs_gym
def test_questions_depend_on_the_seed_alone() -> None:
    """Python shuffles sets by PYTHONHASHSEED. Examples are none of the questions."""
    code = (
        "from loraprune_ds.evaluate.tasks import TaskSettings, load_tasks;"
        "print(*(task.digest for task in load_tasks(TaskSettings(('reasoning_gym',)))))"
    )
    loaded = load_tasks(TaskSettings(("reasoning_gym",)))
    assert [task.name for task in loaded] == [f"reasoning_gym:{name}" for name in GYM_DEFAULT]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # here it is another one
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[-len(loaded) :] == [task.digest for task in loaded]
    for task in loaded:
        assert (len(task.questions), len(task.examples)) == (100, 3)
        asked = {entry["question"] for entry in task.questions}
        assert not any(entry["question"] in asked for entry in task.examples)
        assert all(task.score(entry["answer"], entry) == 1 for entry in task.questions)


@needs_gym
def test_an_answer_that_the_scorer_cannot_read_is_wrong() -> None:
    (task,) = load_tasks(of_gym("prime_factorization"))
    assert task.score("x", task.questions[0]) == 0.0


# Answers and scores


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def task_of(*lengths: int) -> GymTask:
    """Makes questions of different lengths, so that batches need padding."""
    entries = [{"question": words(*range(1, n + 1)), "answer": words(5, n)} for n in lengths]
    scorer = SimpleNamespace(
        score_answer=lambda answer, entry: 1.0 if answer == entry["answer"] else 0.25
    )
    return GymTask("reasoning_gym:made", scorer, entries[1:], entries[:1])


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_answers_in_batches_and_on_ranks_are_those_of_each_question_alone(
    template: str | None, tmp_path: Path
) -> None:
    folder = make_tiny_llama(tmp_path, vocab=70, seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.max_position_embeddings = 64
    tokenizer = make_tokenizer(template="<s> $A")
    tokenizer.chat_template = template
    task, writer = task_of(2, 9, 1, 6, 3, 4), Writer(model, tokenizer)
    expected = []
    for entry in task.questions:
        first, question = task.examples[0], entry["question"]
        plain = f"<s> {first['question']} {first['answer']} {question}"
        chat = (
            f"<s> {first['question']} </s> <s> {first['answer']} </s> <s> {question} </s> <s> w59"
        )
        ids = tokenizer(chat if template else plain, add_special_tokens=False)["input_ids"]
        made: list[int] = []
        while len(made) < 2 + tasks.ROOM and made[-1:] != [tokenizer.eos_token_id]:
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        expected.append(str(tokenizer.decode(made, skip_special_tokens=True)).strip())
    assert len(set(expected)) > 1
    assert greedy_answers(task, writer, 3, rank_of(1, 0)) == expected
    by_rank_1 = {2: expected[2], 3: expected[3]}  # of batches of two, it has the second
    of_two = rank_of(2, 0, gather_objects=lambda mine: [by_rank_1, mine])
    assert greedy_answers(task, writer, 2, of_two) == expected
    must_name(
        "--tasks reasoning_gym:made 64", greedy_answers, task_of(2, 60), writer, 2, rank_of(1, 0)
    )
    model.resize_token_embeddings(18)
    must_name("reasoning_gym:made vocab_size 18", greedy_answers, task, writer, 2, rank_of(1, 0))


def test_exact_match_is_the_share_of_full_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(2, 3, 4, 6, 7)
    right = [entry["answer"] for entry in task.questions]
    monkeypatch.setattr(tasks, "load_tasks", lambda settings: (task,))
    monkeypatch.setattr(tasks, "version", lambda package: "0")
    monkeypatch.setattr(tasks, "greedy_answers", lambda *given: [right[0], "w1", "w1", "w1"])
    settings = TaskSettings(("reasoning_gym:made",))
    found: Any = tasks.run_tasks(
        settings, Writer(cast(Any, None), make_tokenizer()), 2, rank_of(1, 0)
    )
    error = (0.25 * 0.75 / 3) ** 0.5
    metrics = {
        "exact_match,none": 0.25,
        "exact_match_stderr,none": error,
        "score,none": (1 + 3 * 0.25) / 4,
    }
    assert found["results"] == {"reasoning_gym:made": metrics}
    about = found["settings"]["reasoning_gym"]
    assert (about["fewshot"], about["documents"], about["chat_template"]) == (
        1,
        {"reasoning_gym:made": 4},
        False,
    )


# After a run


def kept(accuracy: float, **texts: Any) -> dict[str, Any]:
    answers = {"chat_template": True, "greedy": {"ended": 1.0} | texts, "closeness": None}
    return {"tasks": {"results": {"t": {"acc,none": accuracy}}}, "answers": answers}


def judged(accuracy: float) -> dict[str, Any]:
    """Returns an evaluation, of which a report has what is `kept`."""
    plan = {"name": "default", "prompts": ["a"]}
    return kept(accuracy, texts=["a"]) | {"perplexity": None, "answers_plan": plan}


def run_of(*after: str) -> RunConfig:
    return config_from_dict({"output_dir": "out", "evaluate": {"after": list(after)}})


def test_what_is_asked_for_after_a_run_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    result = judged(0.1) | {"dense": judged(0.3)}

    def measured(command: list[str], env: dict[str, str], **options: Any) -> Any:
        assert not after.RANK & env.keys()  # it is a separate process, not a rank
        assert not any(key.startswith("TORCHELASTIC") for key in env)
        calls.append(command)
        return SimpleNamespace(returncode=int(len(calls) == 1), stdout=json.dumps(result))

    monkeypatch.setattr(subprocess, "run", measured)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    write_json(tmp_path / "report.json", {"shelf": []})
    after.measure_after(run_of(), tmp_path, print)
    assert not calls
    config = run_of("answers", "piqa", "tasks")
    with pytest.raises(RunError, match=r"evaluate\.after"):
        after.measure_after(config, tmp_path, print)
    assert read_json(tmp_path / "report.json") == {"shelf": []}
    for _ in range(2):
        after.measure_after(config, tmp_path, print)
    assert len(calls) == 2
    assert calls[1][calls[1].index("--page") + 1] == str(tmp_path / "answers.html")
    assert calls[1][-6:] == ["--dtype", "bfloat16", "--answers", "--tasks", "piqa", "reasoning_gym"]
    asked = {"asked": ["answers", "piqa", "tasks"], "answers_plan": {"name": "default"}}
    asked |= kept(0.1) | {"dense": kept(0.3)}
    assert read_json(tmp_path / "report.json") == {"shelf": [], "after": asked}
    assert read_json(tmp_path / "evaluation.json") == result
    after.measure_after(run_of("piqa"), tmp_path, print)
    assert calls[2][-2:] == ["--tasks", "piqa"]


def test_each_size_of_a_shelf_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def measured(command: list[str], **options: Any) -> Any:
        calls.append(command)
        result = judged(0.1) | {"dense": judged(0.3)}
        result["answers"]["closeness"] = {"agreement": 0.5 / len(calls)}
        return SimpleNamespace(returncode=0, stdout=json.dumps(result))

    monkeypatch.setattr(subprocess, "run", measured)
    rows = [
        {"size": size, "parameters": 9, "perplexity": 2.0, "folder": f"model-{size}"}
        for size in ("0.2", "0.5")
    ]
    for row in rows:
        (tmp_path / row["folder"]).mkdir()
    lost = {"size": "0.1", "folder": "model-0.1"}
    write_json(tmp_path / "report.json", {"shelf": [lost, *rows], "perplexity": {"dense": 1.0}})
    after.measure_after(run_of("answers"), tmp_path, print)
    assert [str(tmp_path / "model-0.2") in call for call in calls] == [True, False]
    assert str(tmp_path) in calls[1]  # the last size is the run's model
    report = read_json(tmp_path / "report.json")
    assert [row["agreement"] for row in report["shelf"]] == [0.5, 0.25]
    assert report["shelf"][0]["after"]["tasks"] == kept(0.1)["tasks"]
    assert (tmp_path / "shelf.png").exists()


def test_wrong_tasks_are_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks.load_tasks.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    after.check_after(run_of("answers"))
    must_name("evaluate.after reasoning-gym", after.check_after, run_of("answers", "tasks"))
    tokenizer = make_tokenizer()
    must_name(
        "evaluate.after default 1", after.check_prompts, run_of("answers"), tokenizer, 130, 100
    )
    after.check_prompts(run_of("tasks"), tokenizer, 130, 100)
