"""Tasks of reasoning-gym: questions by a seed, greedy answers, the package's own score. And `evaluate.after`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.cli import after
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict
from loraprune_ds.errors import RunError
from loraprune_ds.evaluate import tasks
from loraprune_ds.evaluate.settings import TaskSettings
from loraprune_ds.evaluate.tasks import FEWSHOT, GYM_DEFAULT, QUESTIONS, gym_task
from loraprune_ds.files import read_json, write_json
from loraprune_ds.generate.writer import Writer
from loraprune_ds.report.measured import Value, read_measured
from tests.oracle.models import make_tiny_llama
from tests.support.evaluations import HELD_OUT, measured_of
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
    must_name("--tasks lm-eval[hf]", tasks.check_tasks, of_gym("chain_sum"))
    installed = {"lm_eval"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    must_name("--tasks reasoning-gym", tasks.check_tasks, of_gym("chain_sum"))


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


def questions_of(name: str) -> tuple[Any, Any]:
    """Returns a task's questions and its examples."""
    task = gym_task(name, FEWSHOT, QUESTIONS)
    return list(task.test_docs()), task.config.fewshot_config.samples


@needs_gym
def test_questions_depend_on_the_seed_alone() -> None:
    """Python shuffles sets by PYTHONHASHSEED. Examples are none of the questions."""
    code = (
        "import json; from tests.unit.test_tasks import GYM_DEFAULT, questions_of;"
        "print(json.dumps([questions_of(name) for name in GYM_DEFAULT]))"
    )
    made = [questions_of(name) for name in GYM_DEFAULT]
    environment = {**os.environ, "PYTHONHASHSEED": "1"}  # here it is another one
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(answer.stdout.splitlines()[-1]) == [list(pair) for pair in made]
    for name, (questions, examples) in zip(GYM_DEFAULT, made, strict=True):
        assert (len(questions), len(examples)) == (QUESTIONS, FEWSHOT)
        asked = {row["question"] for row in questions}
        assert not any(row["question"] in asked for row in examples)
        score = gym_task(name, FEWSHOT, QUESTIONS).process_results
        assert all(score(row, [row["answer"]])["exact_match"] == 1 for row in questions)


@needs_gym
def test_an_answer_that_the_scorer_cannot_read_is_wrong() -> None:
    task = gym_task("prime_factorization", 3, 2)
    assert task.process_results(next(iter(task.test_docs())), ["x"])["score"] == 0


# Answers and scores


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def entries_of(*lengths: int) -> list[dict[str, str]]:
    """Makes questions of different lengths, so that batches need padding."""
    return [{"question": words(*range(1, n + 1)), "answer": words(5)} for n in lengths]


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_answers_in_batches_are_those_of_each_question_alone(
    template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_llama(tmp_path, vocab=70, seed=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = make_tokenizer(template="<s> $A")
    tokenizer.chat_template = template
    example, *questions = entries_of(2, 9, 1, 6, 3, 4)
    expected = []
    for entry in questions:
        question = entry["question"]
        plain = f"<s> {example['question']} {example['answer']} {question}"
        chat = f"<s> {example['question']} </s> <s> {example['answer']} </s> <s> {question} </s> <s> w59"
        ids = tokenizer(chat if template else plain, add_special_tokens=False)["input_ids"]
        made: list[int] = []
        while len(made) < len(words(5)) + tasks.ROOM and made[-1:] != [tokenizer.eos_token_id]:
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        expected.append(str(tokenizer.decode(made, skip_special_tokens=True)).strip())
    assert len(set(expected)) > 1
    given: list[str] = []

    def score(answer: str, entry: dict[str, str]) -> float:
        given.append(answer)
        return 1.0 if answer == expected[0] else 0.25

    data = SimpleNamespace(score_answer=score), questions, [example]
    monkeypatch.setattr(tasks, "_make_questions", lambda *_: data)
    monkeypatch.setattr(tasks, "version", lambda package: "0")
    tasks.gym_task.cache_clear()
    settings = TaskSettings(("reasoning_gym:made",), fewshot=1)
    writer = Writer(model, tokenizer)
    alone = rank_of(1, 0, barrier=None, all_gather=None)
    found: Any = tasks.run_tasks(settings, writer, 3, alone)
    assert given == expected
    share = expected.count(expected[0]) / len(expected)
    metrics = found["results"]["reasoning_gym:made"]
    assert metrics["exact_match,none"] == share
    assert metrics["score,none"] == pytest.approx(share + 0.25 * (1 - share))
    assert found["settings"]["reasoning_gym"]["documents"] == {"reasoning_gym:made": 5}
    model.config.max_position_embeddings = 16
    must_name("--tasks prompt --num-fewshot", tasks.run_tasks, settings, writer, 3, alone)
    tasks.gym_task.cache_clear()


# After a run


def judged(agreement: float) -> dict[str, Any]:
    """Returns an evaluation, whose record goes into a report."""
    found = measured_of("runs/a", parameters=Value(5, 9), agreement=Value(agreement, None, "t"))
    return {"answers": {"texts": ["a"]}, "measured": found}


def run_of(*after: str) -> RunConfig:
    return config_from_dict({"output_dir": "out", "evaluate": {"after": list(after)}})


def test_what_is_asked_for_after_a_run_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    result = judged(0.1)

    def measured(command: list[str], env: dict[str, str], **options: Any) -> Any:
        assert not after.RANK & env.keys()  # it is a separate process, not a rank
        assert not any(key.startswith("TORCHELASTIC") for key in env)
        calls.append(command)
        return SimpleNamespace(returncode=int(len(calls) == 1), stdout=json.dumps(result))

    monkeypatch.setattr(subprocess, "run", measured)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    perplexity = Value(3.0, 2.0, HELD_OUT)
    report = {"steps": 9, "measured": measured_of("model", perplexity=perplexity)}
    write_json(tmp_path / "report.json", report)
    after.measure_after(run_of(), tmp_path, print)
    assert not calls
    config = run_of("answers", "piqa", "tasks")
    with pytest.raises(RunError, match=r"evaluate\.after"):
        after.measure_after(config, tmp_path, print)
    assert read_json(tmp_path / "report.json") == report
    for _ in range(2):
        after.measure_after(config, tmp_path, print)
    assert len(calls) == 2
    assert calls[1][calls[1].index("--page") + 1] == str(tmp_path / "answers.html")
    assert calls[1][-6:] == ["--dtype", "bfloat16", "--answers", "--tasks", "piqa", "reasoning_gym"]
    found = read_measured(read_json(tmp_path / "report.json"), tmp_path)
    assert (found.name, found.method) == ("model", "lora, uniform")
    assert found.values == {
        "perplexity": perplexity,  # the run's own stays
        "parameters": Value(5, 9),
        "agreement": Value(0.1, None, "t"),
    }
    assert read_json(tmp_path / "report.json")["after"] == ["answers", "piqa", "tasks"]
    assert read_json(tmp_path / "evaluation.json") == result
    after.measure_after(run_of("piqa"), tmp_path, print)
    assert calls[2][-2:] == ["--tasks", "piqa"]


def test_a_report_of_another_version_is_told_with_its_commit(tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", {"params": {}, "versions": {"commit": "8ac16b60"}})
    must_name("report.json 8ac16b60", after.measure_after, run_of("piqa"), tmp_path, print)


def test_wrong_tasks_are_told_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    after.check_after(run_of("answers"))
    must_name("evaluate.after lm-eval", after.check_after, run_of("answers", "tasks"))
    tokenizer = make_tokenizer()
    must_name(
        "evaluate.after default 1", after.check_prompts, run_of("answers"), tokenizer, 130, 100
    )
    after.check_prompts(run_of("tasks"), tokenizer, 130, 100)
