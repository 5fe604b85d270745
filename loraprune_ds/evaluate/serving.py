"""Speed of models in the user's own server: llama.cpp or vLLM, in the Python that has it.

Each model has its own process. They take turns within every round, as in speed.py, so that other work on the machine
slows all of them equally.
"""

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NoReturn

from loraprune_ds.errors import UserError, require
from loraprune_ds.evaluate.settings import Server, ServeSettings

MODULES = {"llama.cpp": "llama_cpp", "vllm": "vllm"}
PYTHONS = {"llama.cpp": "LLAMA_CPP_PYTHON", "vllm": "VLLM_PYTHON"}  # variables that may name the Python
WORKER = Path(__file__).with_name("serve_worker.py")


@dataclass(frozen=True)
class ServedModel:
    """A GGUF file for llama.cpp or a Hugging Face folder for vLLM."""

    path: Path
    form: str  # "gguf-f16" for example, or "hf"
    vocabulary: int
    trust_remote_code: bool = False
    model_impl: str = "auto"  # vLLM's choice of an implementation


@dataclass(frozen=True)
class Served:
    """Medians of one model over the rounds."""

    server: str
    version: str
    form: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    batch_tokens_per_second: float | None  # written by a batch, its prompts' time included. None in llama.cpp


def find_server(server: Server, python: str | None) -> str:
    """Returns the Python that has a server. `python` defaults to the server's environment variable."""
    named = python or os.environ.get(PYTHONS[server])
    if named is None:
        raise UserError(f"--serve {server} needs --serve-python, or {PYTHONS[server]}: a Python with {MODULES[server]}")
    found = shutil.which(os.path.expanduser(named))
    if found is None:
        raise UserError(f"--serve-python: {named} is no program")
    look = f"import importlib.util as u, sys; sys.exit(u.find_spec({MODULES[server]!r}) is None)"
    there = subprocess.run([found, "-c", look], env=_environment(), capture_output=True, check=False).returncode == 0
    require(there, f"--serve {server}: {named} has no {MODULES[server]}")
    return found


def measure_serving(models: Sequence[ServedModel], settings: ServeSettings) -> list[Served]:
    """Returns one result per model."""
    draw = random.Random(0)
    vocabulary = min(model.vocabulary for model in models)
    prompt = [draw.randrange(vocabulary) for _ in range(settings.prompt)]
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(model, prompt, settings)) for model in models]
        versions = [worker.read()["version"] for worker in workers]
        rounds = [[worker.play() for worker in workers] for _ in range(settings.rounds + 1)]
    return [
        _medians(model, version, [turn[i] for turn in rounds[1:]], settings)
        for i, (model, version) in enumerate(zip(models, versions, strict=True))
    ]


class _Worker(AbstractContextManager["_Worker"]):
    """A process with one model."""

    def __init__(self, model: ServedModel, prompt: list[int], settings: ServeSettings) -> None:
        self._model, self._server = model, settings.server
        job = {
            "server": settings.server,
            "model": str(model.path.resolve()),
            "prompt": prompt,
            "generated": settings.generated,
            "batch": settings.batch,
            "trust_remote_code": model.trust_remote_code,
            "model_impl": model.model_impl,
        }
        self._errors: IO[bytes] = TemporaryFile()
        self._process = subprocess.Popen(
            [settings.python, str(WORKER), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(),
            start_new_session=True,  # vLLM starts more processes, which end with it
        )

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def play(self) -> dict[str, float]:
        """Plays a round and returns its seconds."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._fail()
        return json.loads(line)

    def _fail(self) -> NoReturn:
        self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        last = said[-1] if said else "it said nothing"
        why = next((line for line in reversed(said) if "Error" in line), last)
        raise UserError(f"{self._server} cannot serve {self._model.path}: {why}")


def _environment() -> dict[str, str]:
    """Returns the environment without the variables of this process's packages and ranks."""
    own = ("PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in own}


def _medians(model: ServedModel, version: str, rounds: list[dict[str, float]], settings: ServeSettings) -> Served:
    seconds = {key: statistics.median(turn[key] for turn in rounds) for key in rounds[0]}
    batch = settings.batch * settings.generated / seconds["batch"] if "batch" in seconds else None
    return Served(
        settings.server,
        version,
        model.form,
        settings.prompt / seconds["prefill"],
        settings.generated / seconds["decode"],
        batch,
    )
