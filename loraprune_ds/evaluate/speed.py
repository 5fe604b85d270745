"""Speed of models at batch size 1: prefill and decode of one sequence.

The models take turns within every round, so that other work on the machine slows all of them equally.
"""

import inspect
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from loraprune_ds.errors import UserError, require
from loraprune_ds.evaluate.settings import Server, ServeSettings, SpeedSettings
from loraprune_ds.zero.device import accelerator, is_cpu

# transformers renamed the argument between the versions that pyproject.toml allows.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class Speed:
    """Medians of one model over the rounds."""

    prefill_tokens_per_second: float  # of a prompt in one pass, with logits of its last token only
    decode_tokens_per_second: float  # of tokens written one by one after the prompt, with a key-value cache
    peak_bytes: int | None  # largest device memory beyond the weights. None on a CPU


class _Round(NamedTuple):
    prefill: float  # seconds
    decode: float
    peak_bytes: int | None


def measure_speed(models: Sequence[PreTrainedModel], settings: SpeedSettings) -> list[Speed]:
    """Returns one result per model."""
    vocabulary = min(int(model.config.vocab_size) for model in models)
    prompt = torch.randint(vocabulary, (1, settings.prompt), generator=torch.Generator().manual_seed(0))
    rounds = [[_run(model, prompt, settings.generated) for model in models] for _ in range(settings.rounds + 1)]
    return [_medians([turn[i] for turn in rounds[1:]], settings) for i in range(len(models))]


@torch.no_grad()
def _run(model: PreTrainedModel, prompt: Tensor, generated: int) -> _Round:
    """Runs one round: reads `prompt` (1, tokens) and writes `generated` tokens."""
    token_ids = prompt.to(model.device)
    before = None
    if not is_cpu():
        accelerator().reset_peak_memory_stats()
        before = accelerator().memory_allocated()
    cache = {CACHE: DynamicCache(config=model.config), "use_cache": True}  # filled in place
    times = [_now()]
    logits = model(input_ids=token_ids, logits_to_keep=1, **cache).logits
    times.append(_now())
    for _ in range(generated):
        logits = model(input_ids=logits.argmax(-1), **cache).logits  # (1, 1, vocabulary)
    times.append(_now())
    peak = None if before is None else accelerator().max_memory_allocated() - before
    return _Round(times[1] - times[0], times[2] - times[1], peak)


def _now() -> float:
    """Returns the seconds when the device has done all its work."""
    accelerator().synchronize()
    return time.perf_counter()


def _medians(rounds: Sequence[_Round], settings: SpeedSettings) -> Speed:
    peaks = [turn.peak_bytes for turn in rounds if turn.peak_bytes is not None]
    return Speed(
        settings.prompt / statistics.median(turn.prefill for turn in rounds),
        settings.generated / statistics.median(turn.decode for turn in rounds),
        max(peaks, default=None),
    )


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
        _served_medians(model, version, [turn[i] for turn in rounds[1:]], settings)
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


def _served_medians(
    model: ServedModel, version: str, rounds: list[dict[str, float]], settings: ServeSettings
) -> Served:
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
