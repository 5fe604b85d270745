"""Models take turns in the user's server, which here is a fake package in another Python."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from loraprune_ds.errors import UserError
from tests.benchmarks.serving import Plan, Served, ServedModel, measure_serving, served_model
from tests.families import tiny_model
from tests.integration.launching import process_state, within

LLAMA_CPP = """
import os
__version__ = "1.2"
assert "of the caller" not in os.environ["PYTHONPATH"]

class Llama:
    def __init__(self, path, **options):
        self.name = os.path.basename(path)
        if self.name == "broken.gguf":
            raise ValueError("Failed to load model")
        print("what a server prints")
        self.say(f"context {options['n_ctx']}")

    def say(self, text):
        with open(os.environ["SAID"], "a") as file:
            file.write(f"{self.name}: {text}\\n")

    def reset(self):
        self.say("reset")

    def eval(self, tokens):
        assert max(tokens) < 8
        if self.name == "dying.gguf":
            os._exit(3)
        self.say(f"eval {len(tokens)}")

    def sample(self, temp):
        return 7
"""
VLLM = """
import os, subprocess, time
__version__ = "0.9"
clock = [0.0]
time.perf_counter = lambda: clock[0]
slowness = iter([9.0] * 3 + [1.0] * 3 + [2.0] * 3 + [4.0] * 3)  # a warm-up and three rounds, of three calls each

class SamplingParams:
    def __init__(self, **options):
        self.__dict__ |= options

class LLM:
    def __init__(self, model, trust_remote_code, model_impl, enable_prefix_caching, **options):
        assert not enable_prefix_caching
        self.model, self.loaded = model, f"{model_impl}, trust {trust_remote_code}"
        self.engine = subprocess.Popen(["sleep", "300"])  # vLLM starts another process, too

    def generate(self, prompts, parameters, use_tqdm):
        with open(os.environ["SAID"], "a") as file:
            if "BUSY" in os.environ:  # for longer than anyone waits
                print(os.getpid(), self.engine.pid, file=file, flush=True)
                time.sleep(300)
            tokens = {len(prompt["prompt_token_ids"]) for prompt in prompts}
            assert parameters.max_tokens == parameters.min_tokens and parameters.ignore_eos
            clock[0] += len(prompts) * (1 + parameters.max_tokens / 2) * next(slowness)
            file.write(f"{len(prompts)} of {tokens} write {parameters.max_tokens}, {self.loaded}\\n")
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Returns a Python that has both servers. They write down their calls."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "llama_cpp.py").write_text(LLAMA_CPP)
    (packages / "vllm.py").write_text(VLLM)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={packages}:$PYTHONPATH exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("PYTHONPATH", "of the caller")
    return str(program)


def gguf(name: str, vocabulary: int = 8) -> ServedModel:
    return ServedModel(Path(f"{name}.gguf"), "gguf-f16", vocabulary)


def short(server: str, python: str, **changes: int) -> Plan:
    return Plan(server, python, **{"prompt": 5, "generated": 2, "rounds": 1} | changes)


def test_models_take_turns_in_llama_cpp(python: str, tmp_path: Path) -> None:
    dense, pruned = measure_serving([gguf("dense", 50), gguf("pruned")], short("llama.cpp", python))
    said = (tmp_path / "said").read_text().splitlines()
    assert sorted(said[:2]) == ["dense.gguf: context 8", "pruned.gguf: context 8"]
    turn = ["reset", "eval 5", "eval 1", "eval 1"]
    assert said[2:] == [f"{name}.gguf: {call}" for name in ("dense", "pruned", "dense", "pruned") for call in turn]
    assert (dense.version, dense.form, dense.batch_tokens_per_second) == ("1.2", "gguf-f16", None)
    assert pruned.prefill_tokens_per_second > 0
    assert pruned.decode_tokens_per_second > 0


def test_vllm_answers_one_and_a_batch(python: str, tmp_path: Path) -> None:
    model = ServedModel(tmp_path, "hf", 50, True, "transformers")
    (served,) = measure_serving([model], short("vllm", python, batch=3, rounds=3))
    turn = ["1 of {5} write 1", "1 of {5} write 3", "3 of {5} write 2"]
    assert (tmp_path / "said").read_text().splitlines() == [f"{said}, transformers, trust True" for said in turn] * 4
    # The fake takes a second per prompt and half a second per token, twice that in the median round.
    assert served == Served("0.9", "hf", 5 / 3.0, 2 / 2.0, 3 * 2 / (3 * 4.0))


@pytest.mark.parametrize(("family", "model_impl"), [("llama", "auto"), ("qwen2", "transformers")])
def test_vllm_gets_what_fits_the_model(family: str, model_impl: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    assert served_model(str(tmp_path), "hf", tmp_path) == ServedModel(tmp_path, "hf", 97, False, model_impl)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("broken", "^llama.cpp cannot serve broken.gguf: ValueError: Failed to load model$"),
        ("dying", "^llama.cpp cannot serve dying.gguf: what a server prints$"),
    ],
)
def test_a_server_that_ends_is_one_line(name: str, line: str, python: str) -> None:
    with pytest.raises(UserError, match=line):
        measure_serving([gguf(name)], short("llama.cpp", python))


def test_a_benchmark_that_is_killed_ends_its_server(python: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    said = tmp_path / "said"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "BUSY": "1"}
    command = [sys.executable, "-m", "tests.benchmarks.serving", str(tmp_path / "model")]
    benchmark = subprocess.Popen([*command, "--server", "vllm", "--python", python], env=environment)
    pids = list(map(int, within(60, lambda: said.read_text().split() if said.exists() else [])))
    benchmark.kill()
    benchmark.wait()
    try:
        assert within(10, lambda: all(process_state(pid) in ("", "Z") for pid in pids))
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
