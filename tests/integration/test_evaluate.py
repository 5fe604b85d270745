"""Compares launch/evaluate.py and launch/compare.py with a plain computation. Starts them as a user does."""

import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from tests.oracle.models import make_tiny_llama
from tests.support.bad_input import assert_refused
from tests.support.launching import ROOT, Ended, fork_ranks, read_json, run_to_end
from tests.support.refusals import must_name

EVALUATE, COMPARE = ROOT / "launch" / "evaluate.py", ROOT / "launch" / "compare.py"
WINDOW, WINDOWS = 32, 21
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def made(finished: Path) -> Path:
    """Returns a folder with a model dense/, its finished run/, apart/ (LoRA apart), text.txt and tasks/."""
    export(find_contents(finished / "run"), "adapter", finished / "apart")
    write_tasks(finished / "tasks")
    return finished


def write_tasks(folder: Path) -> None:
    """Writes a task with a choice and one of perplexity. Both read local files."""
    folder.mkdir()
    questions = [
        {"query": f"The {noun} is", "choices": [" red.", " made of wood.", " here"], "gold": i % 3}
        for i, noun in enumerate(["house", "car", "sea", "number", "import statement"])
    ]
    texts = [
        {"text": f"The {noun} is an object that has a type, " * 3}
        for noun in ("list", "class", "generator")
    ]
    for name, lines in (("choice", questions), ("prose", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\nmetadata: {version: 1}\n"
    (folder / "choice.yaml").write_text(
        f"task: tiny_choice\n{data % (folder / 'choice.jsonl')}output_type: multiple_choice\n"
        "doc_to_text: '{{query}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{gold}}'\ntarget_delimiter: ''\n"
        "metric_list:\n- {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    (folder / "prose.yaml").write_text(
        f"task: tiny_prose\n{data % (folder / 'prose.jsonl')}output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n- metric: word_perplexity\n"
    )


def evaluate(made: Path, *arguments: str | Path, ranks: int = 1) -> Ended:
    """Returns the end of rank 0."""
    words = list(map(str, arguments))
    return fork_ranks(words, made, script=EVALUATE, ranks=ranks, before=make_noise, timeout=180)[0]


def make_noise() -> None:
    """Prints at every loss, in Python and in C, as libraries do. stdout must hold the answer alone."""
    function = torch.nn.functional.cross_entropy

    def noisy(*arguments: Any, **settings: Any) -> Any:
        print("from Python", flush=True)  # noqa: T201
        os.write(1, b"from C\n")
        return function(*arguments, **settings)

    torch.nn.functional.cross_entropy = noisy


def answer(ended: Ended) -> dict[str, Any]:
    """Returns the one object on stdout of an evaluation that went well."""
    return json.loads(ended.check().out)


def straightforward(folder: Path, text: Path) -> float:
    """Computes perplexity with plain transformers, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(
        text.read_text()
    ).input_ids
    losses = []
    for start in range(0, WINDOWS * WINDOW, WINDOW):
        window = torch.tensor(tokens[start : start + WINDOW])
        with torch.no_grad():
            log_probabilities = model(window[None]).logits[0].double().log_softmax(-1)
        losses += [-float(log_probabilities[i - 1, window[i]]) for i in range(1, WINDOW)]
    return math.exp(math.fsum(losses) / len(losses))


def on_text(made: Path) -> list[str]:
    return [
        "--text",
        str(made / "text.txt"),
        "--window",
        str(WINDOW),
        "--max-windows",
        str(WINDOWS),
        "--json",
    ]


def test_a_run_is_its_model_and_knows_what_it_lost(made: Path) -> None:
    found = answer(evaluate(made, made / "run", *on_text(made), "--dense", made / "dense"))
    assert found["perplexity"] == pytest.approx(
        straightforward(made / "run/model", made / "text.txt"), rel=1e-6
    )
    assert found["dense"]["perplexity"] == pytest.approx(
        straightforward(made / "dense", made / "text.txt"), rel=1e-6
    )
    assert (found["tokens"], found["windows"]) == (WINDOWS * (WINDOW - 1), WINDOWS)
    of_run = read_json(made / "run" / "report.json")["measured"]
    evaluated = found["measured"]
    assert found["removed_fraction"] == of_run["removed"] == evaluated["removed"] > 0.1
    assert of_run["values"]["parameters"] == evaluated["values"]["parameters"]
    assert evaluated["values"]["perplexity"]["dense"] == found["dense"]["perplexity"]
    assert (found["kind"], found["method"], found["dtype"]) == ("run", "lora, global", "float32")


def test_an_adapter_is_merged_on_the_fly(made: Path) -> None:
    """Merges LoRA into the pruned base. That equals the model of the two merged on disk."""
    found = answer(evaluate(made, made / "apart" / "adapter", *on_text(made)))
    assert found["perplexity"] == pytest.approx(
        straightforward(made / "run/model", made / "text.txt"), rel=1e-5
    )
    both = answer(evaluate(made, made / "apart", *on_text(made)))
    assert (both["perplexity"], both["kind"]) == (found["perplexity"], "adapter")
    base = answer(evaluate(made, made / "apart" / "base", *on_text(made)))
    assert abs(found["perplexity"] / base["perplexity"] - 1) > 1e-2


def test_no_room_to_merge_is_told_before_writing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000, total=1000))
    must_name(
        str(tmp_path),
        export,
        find_contents(made / "run" / "checkpoints" / "step-4"),
        "hf",
        tmp_path / "0",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sharded", [[], ["--sharded"]], ids=str)
def test_two_ranks_give_the_same_number(made: Path, sharded: list[str]) -> None:
    """Rank 0 alone writes."""
    arguments = [str(made / "run"), *on_text(made), *sharded, "--batch-size", "4"]
    found = answer(evaluate(made, *arguments, ranks=2))
    assert found["perplexity"] == pytest.approx(
        straightforward(made / "run/model", made / "text.txt"), rel=1e-6
    )
    assert (found["world_size"], found["sharded"]) == (2, bool(sharded))


def test_a_run_measures_answers_at_its_end(made: Path, tmp_path: Path) -> None:
    """The run is over, so a new start has only this left. It measures in a process of its own."""
    folder = tmp_path / "run"
    shutil.copytree(made / "run", folder)
    more = ["--set", f"output_dir={folder}", "--set", "evaluate.after=[answers]"]
    (ended,) = fork_ranks(
        ["--config", str(made / "run.yaml"), *more], tmp_path, cwd=made, timeout=300
    )
    ended.check()
    report, whole = read_json(folder / "report.json"), read_json(folder / "evaluation.json")
    assert report["steps"] == 6
    assert report["after"] == ["answers"]
    found = report["measured"]
    agreement = whole["answers"]["closeness"]["agreement"]
    assert found["values"]["agreement"]["value"] == agreement
    assert "perplexity" in found["values"]  # of the run
    assert len(whole["dense"]["answers"]["greedy"]["texts"]) == 50
    assert "\nanswers that end " in ended.out
    assert "answers.html      answers of both models, side by side" in ended.out
    assert "<h2>50 code</h2>" in (folder / "answers.html").read_text()


BY_HAND = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

folders, tasks, include_path = json.loads(sys.argv[1])
manager = TaskManager(include_path=include_path)
for folder in folders:
    model_args = f"pretrained={folder},dtype=float32,trust_remote_code=True"
    found = simple_evaluate("hf", model_args, tasks, batch_size=16, device="cpu", task_manager=manager)
    print("RESULT " + json.dumps(found["results"]))
"""


@needs_lm_eval
def test_tasks_are_what_lm_eval_by_hand_gives(made: Path) -> None:
    """On two ranks, with the tokenizer and settings that lm-eval chooses for a folder, dense or pruned."""
    tasks = ["tiny_choice", "tiny_prose"]
    arguments = ["--tasks", *tasks, "--include-path", made / "tasks", "--json"]
    found = answer(evaluate(made, made / "run", "--dense", made / "dense", *arguments, ranks=2))
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(made / "home")}
    job = json.dumps(
        [[str(made / "run" / "model"), str(made / "dense")], tasks, str(made / "tasks")]
    )
    by_hand = run_to_end(
        [sys.executable, "-c", BY_HAND, job], cwd=made, environment=offline, timeout=300
    ).check()
    pruned, dense = (json.loads(part.splitlines()[0]) for part in by_hand.out.split("RESULT ")[1:])
    for ours, theirs in ((found, pruned), (found["dense"], dense)):
        shared = ours["tasks"]["results"]
        assert shared["tiny_choice"]["acc,none"] == theirs["tiny_choice"]["acc,none"]
        # These are sums of fp32 log-likelihoods, batched with other texts.
        on_two, alone = (
            result["tiny_prose"]["word_perplexity,none"] for result in (shared, theirs)
        )
        assert on_two == pytest.approx(alone, rel=1e-5)
    assert pruned["tiny_prose"] != dense["tiny_prose"]
    settings = found["tasks"]["settings"]
    assert settings["documents"]["tiny_choice"] == 5
    assert settings["fewshot"] == {"tiny_choice": 0, "tiny_prose": 0}


def test_runs_and_evaluations_are_compared(made: Path, tmp_path: Path) -> None:
    answered = evaluate(made, made / "run", *on_text(made), "--dense", made / "dense")
    (tmp_path / "again.json").write_text(answered.out)
    command = [sys.executable, str(COMPARE), str(made / "run"), str(tmp_path / "again.json")]
    ended = run_to_end([*command, "--picture", str(tmp_path / "picture.png")], cwd=ROOT).check()
    assert {line.split()[0] for line in ended.out.splitlines() if line} == {
        "perplexity:",
        "result",
        "run",
        "again",
    }
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    found = json.loads(run_to_end([*command, "--json"], cwd=ROOT).out)["results"]
    assert [result["method"] for result in found] == ["lora, global"] * 2
    assert found[0]["removed"] == found[1]["removed"]


# Bad input


def make_other(made: Path, here: Path) -> None:
    make_tiny_llama(here / "other", vocab=40)


TEXT, DENSE = "--text {made}/text.txt", "{made}/dense"
# Arguments, names in the error, and a function that makes what is wrong in {here}. Unit tests have more.
BAD: tuple[tuple[str, str, Callable[[Path, Path], None] | None], ...] = (
    (f"{DENSE} --dense {{here}}/other {TEXT}", f"{DENSE} {{here}}/other", make_other),
    (
        "{made}/run/checkpoints/step-4 " + TEXT,
        "{made}/run/checkpoints/step-4 launch/export.py",
        None,
    ),
    ("{here}/nothing --dataset wikitext2", "{here}/nothing", None),  # before a download
    (f"{DENSE} {TEXT} --window 1024", f"{DENSE} max_position_embeddings 512 1024", None),
    (f"{DENSE} --answers --page {{here}}/gone/a.html", "--page {here}/gone/a.html", None),
    ("{made}/apart/adapter " + TEXT + " --sharded", "{made}/apart/adapter --sharded", None),
)


@pytest.mark.parametrize(("arguments", "names", "spoil"), BAD)
def test_bad_input_is_one_line(
    made: Path,
    tmp_path: Path,
    arguments: str,
    names: str,
    spoil: Callable[[Path, Path], None] | None,
) -> None:
    if spoil:
        spoil(made, tmp_path)
    ended = evaluate(made, *arguments.format(made=made, here=tmp_path).split(), "--json")
    assert_refused(ended, *names.format(here=tmp_path, made=made).split())
    assert ended.out == ""
