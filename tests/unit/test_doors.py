"""The commands of launch/ in this process, from their words to what they print and write."""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from loraprune_ds.cli import chats, evaluate, run
from loraprune_ds.config import DataSource
from loraprune_ds.files import read_json, write_json
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report import report
from loraprune_ds.train.data.sources import read_rows
from loraprune_ds.train.data.tokens import read_chat
from tests.support.chat_model import END, make_chat_model
from tests.support.refusals import flip_bit
from tests.support.resuming import write_run

Call = Callable[..., int]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """Calls the `main` of a command with words. This process is its one rank already."""
    environment, stdout = dict(os.environ), os.dup(1)  # `evaluate` sends later prints to stderr

    def main(command: Any, *words: Any, start: str = "main") -> int:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        return getattr(command, start)()

    for command in (chats, evaluate, run):
        monkeypatch.setattr(command, "join_ranks", lambda **_: Communicator())
    monkeypatch.setattr(report, "can_show", lambda package: False)  # pictures take seconds
    yield main
    os.dup2(stdout, 1)
    os.close(stdout)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("model"))


def test_answers_of_one_model_are_printed_and_have_a_page(
    call: Call, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    prompts, page = tmp_path / "prompts.jsonl", tmp_path / "answers.html"
    prompts.write_text('{"prompt": "How much is 2 + 2?"}\n')
    answers = (model, "--answers", prompts, "--max-new-tokens", 3)
    assert call(evaluate, *answers, "--page", page) == 0
    assert "How much is 2 + 2?" in page.read_text()
    printed = capfd.readouterr()
    assert "\nanswers that end" in printed.out
    assert f"page: {page}" in printed.err


def test_a_text_is_measured_as_one_object_where_libraries_may_speak(
    call: Call, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of several windows " * 20)
    assert call(evaluate, model, "--text", text, "--window", 16, "--json", "--verbose") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["perplexity"] > 1
    assert found["answers"] is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--answers", "--page", "answers.txt"], "--page answers.txt: give"),
        (["--answers", "--split", "test"], "--split has no effect"),
        (["--answers", "--max-windows", 3], "--max-windows has no effect"),
        (["--num-fewshot", 1], "--num-fewshot has no effect"),
        (["--tasks", "piqa"], "lm-eval"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    call: Call,
    model: Path,
    words: list[Any],
    named: str,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call(evaluate, model, *words) == 2
    printed = capfd.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert named in printed.err


def test_a_model_writes_chats_from_its_own_prompts(
    call: Call, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "chats.jsonl"
    given = ("--out", out, "--tokens", 60, "--max-new-tokens", 40, "--engine", "transformers")
    assert call(chats, model, *given) == 0
    rows = out.read_text().splitlines()
    assert rows
    assert f"\n{len(rows)} rows of " in capfd.readouterr().out


def test_vllm_answers_each_prompt_with_a_seed_of_its_own(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in says what it was asked, and answers "4" to all."""
    four = AutoTokenizer.from_pretrained(model)("4", add_special_tokens=False)["input_ids"]
    asked: list[tuple[Any, Any]] = []

    class LLM:
        def __init__(self, folder: str, dtype: str) -> None:
            assert (folder, dtype) == (str(model), "float32")

        def generate(self, prompts: Any, settings: Any, use_tqdm: bool) -> list[Any]:
            asked.extend(zip(prompts, settings, strict=True))
            output = SimpleNamespace(token_ids=(*four, END))
            return [SimpleNamespace(outputs=[output]) for _ in prompts]

    vllm: Any = ModuleType("vllm")
    vllm.__spec__, vllm.LLM, vllm.SamplingParams = ModuleSpec("vllm", None), LLM, dict
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "chats.jsonl"
    prompts.write_text("".join(f'{{"prompt": "2 + 2, {i} times"}}\n' for i in range(3)))
    given = ("--prompts", prompts, "--max-new-tokens", 9, "--engine", "vllm")
    assert call(chats, model, "--out", out, *given) == 0
    rows = read_rows(DataSource(str(out), format="chat"))
    assert [read_chat(row).messages[-1]["content"] for row in rows] == ["4"] * 3
    settings = [how for _, how in asked]
    assert len({how["seed"] for how in settings}) == len(settings) == 3
    assert all(END in how["stop_token_ids"] and how["max_tokens"] == 9 for how in settings)


def test_a_run_prints_its_result_and_prints_it_again(
    call: Call, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A result below its ratio has its own exit code, each time."""
    config = write_run(
        tmp_path,
        prune={"ratio": None, "target": "0.08M", "prune_every": 1},
        train={"steps": 3},
        checkpoint={"every": None},
    )
    words = ("--config", config, "--set", "deepspeed=null")
    assert call(run, *words, "--show", "prune.target") == 0
    assert capfd.readouterr().out == "0.08M\n"
    assert call(run, *words) == 0
    first = capfd.readouterr().out
    assert first.startswith("3 steps, ")
    assert "prune.target 0.08M: " in first
    assert call(run, *words) == 0
    out = tmp_path / "out"
    assert capfd.readouterr().out == f"{out} holds this run, finished:\n{first}"
    write_json(out / "status.json", read_json(out / "status.json") | {"error": "too large"})
    assert call(run, *words) == 3
    assert capfd.readouterr().err == "error: too large\n"


def test_a_request_to_an_earlier_process_and_a_damaged_step_are_named(
    call: Call, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    config = write_run(tmp_path, prune={"prune_every": 1}, train={"steps": 3})
    words = ("--config", config, "--set", "deepspeed=null")
    assert call(run, *words) == 0
    out = tmp_path / "out"
    write_json(out / "status.json", read_json(out / "status.json") | {"state": "running"})
    (out / "STOP").touch()
    assert call(run, *words, "--resume", "auto") == 0
    assert f"{out / 'STOP'} was there before this start: removed" in capfd.readouterr().err
    step = out / "checkpoints" / "step-3"
    flip_bit(step / "lora-00000.safetensors")
    elsewhere = ("--set", f"output_dir={tmp_path / 'new'}", "--resume", step)
    assert call(run, *words, *elsewhere) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert str(step) in line
    assert "damaged" in line
    assert not (tmp_path / "new").exists()


def test_each_rank_on_this_machine_gets_its_share_of_the_cores(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_run(tmp_path)
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for words in ((), ("--ranks", 3)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        call(run, "--config", config, *words, start="launch")
        assert os.environ.get("OMP_NUM_THREADS") == ("2" if words else None)
    assert started[1][-2:] == ["--config", str(config)]
    assert started[1][started[1].index("--num_accelerators") + 1] == "3"
