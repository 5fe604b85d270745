"""Times models in llama.cpp or vLLM, which another Python has. Prints one JSON object, with an entry for each model.

python -m tests.benchmarks.serving runs/mine embedded --server llama.cpp --python path/to/venv/bin/python

Each model has its own process, and they share the GPU. They take turns within every round, so that other work on the
machine slows all of them equally. A round reads `--prompt` random tokens and writes `--generated`. vLLM then answers a
batch of such prompts together. Environment variables such as VLLM_CPU_KVCACHE_SPACE reach the server.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NoReturn, cast

from loraprune_ds.errors import UserError, require
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.export.huggingface import copy_model
from loraprune_ds.generate.models import find_model
from loraprune_ds.model.families.base import PRUNED
from tests.benchmarks.running import make_parser, origin

WORKER = Path(__file__).with_name("serve_worker.py")
BATCH = 8  # sequences that vLLM answers together


@dataclass(frozen=True)
class Plan:
    """A round of `prompt` and `generated` tokens. `rounds` follow a warm-up."""

    server: str
    python: str
    prompt: int = 512
    generated: int = 32
    rounds: int = 5
    batch: int = BATCH


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

    version: str
    form: str
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    # written by a batch, its prompts' time included. None in llama.cpp
    batch_tokens_per_second: float | None


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="as in launch/evaluate.py")
    parser.add_argument("--server", choices=("llama.cpp", "vllm"), required=True)
    parser.add_argument("--python", required=True, help="of the environment that has the server")
    for name in ("prompt", "generated", "rounds"):
        default = getattr(Plan, name)
        parser.add_argument(
            f"--{name}", type=int, metavar="N", default=default, help=f"default: {default}"
        )
    parser.add_argument(
        "--gguf", choices=("f16", "q8_0"), default="f16", help="file for llama.cpp (default: f16)"
    )
    given = parser.parse_args()
    plan = Plan(given.server, given.python, given.prompt, given.generated, given.rounds)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an export prints goes to stderr
    form = "hf" if plan.server == "vllm" else f"gguf-{given.gguf}"
    with TemporaryDirectory(prefix="serve-") as scratch:
        models = [
            served_model(path, form, Path(scratch, str(i))) for i, path in enumerate(given.models)
        ]
        served = measure_serving(models, plan)
    entries = [
        {"path": path, **asdict(one)} for path, one in zip(given.models, served, strict=True)
    ]
    result = {
        "models": entries,
        "plan": {k: v for k, v in asdict(plan).items() if k != "python"},
        **origin(),
    }
    with stdout:
        stdout.write(json.dumps(result, indent=2) + "\n")


def served_model(path: str, form: str, out: Path) -> ServedModel:
    """Finds or writes the files that a server loads. The only modelling file that may run is this package's."""
    source = find_model(path)
    require(
        not source.adapter,
        f"{path}: an adapter cannot be served; merge it into its base model first",
    )
    shape, folder = source.pretrained.shape, source.pretrained.folder
    trust = form == "hf" and shape.model_type.startswith(PRUNED)
    if form != "hf":
        export(find_contents(folder), form, out)
        (folder,) = out.glob("*.gguf")
    elif trust:
        out.mkdir()
        copy_model(source.pretrained, out)
        folder = out
    return ServedModel(
        folder, form, source.pretrained.config["vocab_size"], trust, shape.family.vllm
    )


def measure_serving(models: Sequence[ServedModel], plan: Plan) -> list[Served]:
    """Returns one result per model."""
    draw = random.Random(0)
    vocabulary = min(model.vocabulary for model in models)
    prompt = [draw.randrange(vocabulary) for _ in range(plan.prompt)]
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(model, prompt, plan)) for model in models]
        versions = [worker.read()["version"] for worker in workers]
        rounds = [[worker.play() for worker in workers] for _ in range(plan.rounds + 1)]
    of_models = zip(*rounds[1:], strict=True)
    return [_medians(*given, plan) for given in zip(models, versions, of_models, strict=True)]


class _Worker(AbstractContextManager["_Worker"]):
    """A process with one model. It ends, with all that it has started, when this process ends."""

    def __init__(self, model: ServedModel, prompt: list[int], plan: Plan) -> None:
        self._model, self._server = model, plan.server
        settings = {"trust_remote_code": model.trust_remote_code, "model_impl": model.model_impl}
        job = asdict(plan) | settings | {"model": str(model.path.resolve()), "prompt": prompt}
        self._errors: IO[bytes] = TemporaryFile()
        self._process = subprocess.Popen(
            [plan.python, str(WORKER), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            start_new_session=True,  # vLLM starts more processes, which end with it
        )
        self._requests, self._answers = (
            cast(IO[str], self._process.stdin),
            cast(IO[str], self._process.stdout),
        )

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def play(self) -> dict[str, float]:
        """Plays a round and returns its seconds."""
        with suppress(BrokenPipeError):
            self._requests.write("\n")
            self._requests.flush()
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


def _medians(
    model: ServedModel, version: str, rounds: Sequence[dict[str, float]], plan: Plan
) -> Served:
    seconds = {key: statistics.median(turn[key] for turn in rounds) for key in rounds[0]}
    batch = plan.batch * plan.generated / seconds["batch"] if "batch" in seconds else None
    return Served(
        version,
        model.form,
        plan.prompt / seconds["prefill"],
        plan.generated / seconds["decode"],
        batch,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
