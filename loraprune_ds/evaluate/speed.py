"""Speed of models at batch size 1: prefill and decode of one sequence, by torch or in the user's server.

In a server each model has its own process. The models take turns within every round, so that other work on the machine
slows all of them equally.
"""

import inspect
import json
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NoReturn, cast

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from loraprune_ds.errors import RunError, UserError, require
from loraprune_ds.evaluate.models import find_model
from loraprune_ds.evaluate.settings import ServeSettings, SpeedSettings, server_environment
from loraprune_ds.export.formats import export
from loraprune_ds.export.huggingface import copy_model
from loraprune_ds.export.lora import find_source
from loraprune_ds.model.family import PRUNED
from loraprune_ds.zero.device import accelerator, is_cpu

# transformers renamed the argument between the versions that pyproject.toml allows.
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
WORKER = Path(__file__).with_name("serve_worker.py")
Round = tuple[float, float, int | None]  # seconds of prefill and of decode, and the peak in bytes


@dataclass(frozen=True)
class Speed:
    """Medians of one model over the rounds."""

    prefill_tokens_per_second: float  # of a prompt in one pass, with logits of its last token only
    decode_tokens_per_second: float  # of tokens written one by one after the prompt, with a key-value cache
    peak_bytes: int | None  # largest device memory beyond the weights. None on a CPU


def measure_speed(models: Sequence[PreTrainedModel], settings: SpeedSettings) -> list[Speed]:
    """Returns one result per model."""
    vocabulary = min(int(model.config.vocab_size) for model in models)
    prompt = torch.randint(vocabulary, (1, settings.prompt), generator=torch.Generator().manual_seed(0))
    rounds = [[_run(model, prompt, settings.generated) for model in models] for _ in range(settings.rounds + 1)]
    return [_medians([turn[i] for turn in rounds[1:]], settings) for i in range(len(models))]


@torch.no_grad()
def _run(model: PreTrainedModel, prompt: Tensor, generated: int) -> Round:
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
    return times[1] - times[0], times[2] - times[1], peak


def _now() -> float:
    """Returns the seconds when the device has done all its work."""
    accelerator().synchronize()
    return time.perf_counter()


def _medians(rounds: Sequence[Round], settings: SpeedSettings) -> Speed:
    prefill, decode, peaks = zip(*rounds, strict=True)
    return Speed(
        settings.prompt / statistics.median(prefill),
        settings.generated / statistics.median(decode),
        max((peak for peak in peaks if peak is not None), default=None),
    )


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


class Terminated(RunError):
    """SIGTERM as an exception, so that files and servers are cleaned up."""

    exit_code = 128 + signal.SIGTERM


def raise_when_terminated() -> None:
    """Makes SIGTERM raise Terminated in this process."""

    def terminate(*_: object) -> NoReturn:
        raise Terminated("ended by SIGTERM")

    signal.signal(signal.SIGTERM, terminate)


def serve(paths: list[str], settings: ServeSettings, precision: str) -> list[Served]:
    """Measures the models in a server. llama.cpp gets GGUF files of `precision`. SIGTERM raises Terminated."""
    raise_when_terminated()
    form = "hf" if settings.server == "vllm" else f"gguf-{precision}"
    with TemporaryDirectory(prefix="serve-") as scratch:
        models = [served_model(path, form, Path(scratch, str(i))) for i, path in enumerate(paths)]
        return measure_serving(models, settings)


def served_model(path: str, form: str, out: Path) -> ServedModel:
    """Finds or writes the files that a server loads. The only modelling file that may run is this package's."""
    source = find_model(path)
    require(not source.adapter, f"{path}: --serve cannot merge an adapter; merge it into its base model first")
    shape, folder = source.pretrained.shape, source.pretrained.folder
    trust = form == "hf" and shape.model_type.startswith(PRUNED)
    if form != "hf":
        export(find_source(folder), form, out)
        (folder,) = out.glob("*.gguf")
    elif trust:
        out.mkdir()
        copy_model(source.pretrained, out, lambda file, link: link.symlink_to(file.resolve()))
        folder = out
    return ServedModel(folder, form, source.pretrained.config["vocab_size"], trust, shape.family.vllm)


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
            env=server_environment(),
            start_new_session=True,  # vLLM starts more processes, which end with it
        )
        self._requests, self._answers = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def play(self) -> dict[str, float]:
        """Plays a round and returns its seconds."""
        try:
            self._requests.write("\n")
            self._requests.flush()
        except BrokenPipeError:
            self._fail()
        return self.read()

    def read(self) -> dict[str, Any]:
        line = self._answers.readline()
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
