"""Makes whole runs of tiny models, each by a launcher. Asks a process without this package to read the results."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from tests.oracle.models import make_tiny_llama
from tests.support.launching import (
    Ended,
    Launcher,
    fork_ranks,
    launch,
    read_json,
    write_config,
    write_text,
)
from tests.support.paper import FREE, PAPER
from tests.support.resuming import metrics, read_tensors
from tests.support.stranger import ask_stranger

VOCAB, LAYERS, HEAD_DIM = 259, 3, 8
STEPS, WINDOW, WINDOWS = 6, 32, 24
_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
SIZES, GLOBAL = _FILE["sizes"], _FILE["global"]


@dataclass(frozen=True)
class Case:
    """Describes one run. `source`: sizes of a fresh model, or the case whose pruned model is pruned again."""

    name: str
    becomes: str  # model_type of the result
    source: dict[str, Any] | str
    ranks: int = 2
    launcher: Launcher | None = "deepspeed"  # None: forked ranks, which take half the time
    dtype: str = "float32"
    prune: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = tuple(Case(**x) for x in _FILE["cases"])
NAMES = [case.name for case in CASES]


@dataclass
class Run:
    """A case that has been run, successfully or not."""

    case: Case
    source: Path
    config: Path
    folder: Path
    ended: Ended

    @cached_property
    def report(self) -> dict[str, Any]:
        return read_json(self.folder / "report.json")

    def records(self, kind: str) -> list[dict[str, Any]]:
        return metrics(self.folder, kind)

    @cached_property
    def before(self) -> dict[str, Tensor]:
        return read_tensors(self.source)

    @cached_property
    def after(self) -> dict[str, Tensor]:
        return read_tensors(self.folder / "model")


def run_all(root: Path) -> dict[str, Run]:
    """All cases, one after the other."""
    write_text(root / "text.txt", 12_000)
    write_text(root / "held_out.txt", 2_000, start=50_000)
    runs: dict[str, Run] = {}
    for seed, case in enumerate(CASES):
        if isinstance(case.source, str):
            source = runs[case.source].folder / "model"
        else:
            sizes = {
                "head_dim": HEAD_DIM,
                "layers": LAYERS,
                "vocab": VOCAB,
                "dtype": case.dtype,
                **case.source,
            }
            # "watched" and "uniform" are the same run
            seed = 1 if case.name == "watched" else seed + 1
            source = make_tiny_llama(root / f"{case.name}_dense", seed=seed, **sizes)
        config = write_config(root / f"{case.name}.yaml", run_config(case, source, root))
        runs[case.name] = Run(case, source, config, root / case.name, _start(case, config, root))
    return runs


def _start(case: Case, config: Path, root: Path) -> Ended:
    """Starts from another folder than the checkout. Shipped files are found from anywhere."""
    arguments = ["--config", str(config)]
    if case.launcher is None:
        return fork_ranks(arguments, root, ranks=case.ranks, cwd=root, timeout=300)[0]
    return launch(arguments, launcher=case.launcher, ranks=case.ranks, cwd=root)


def run_config(case: Case, source: Path, root: Path) -> dict[str, Any]:
    """Builds a config that cuts after steps 3 and 5 of 6. Dropout is on."""
    schedule = {"prune_every": 2, "warmup_fraction": 0.2, "cooldown_fraction": 0.2} | case.prune
    train = {"distill_weight": 0, "learning_rate": 1e-3} | case.train
    return {
        "output_dir": str(root / case.name),
        "model": {"path": str(source), "dtype": case.dtype},
        "lora": {"r": 4},
        "data": {
            "path": str(root / "text.txt"),
            "held_out": str(root / "held_out.txt"),
            "window": WINDOW,
        },
        "prune": PAPER | FREE | {"ratio": 0.4} | schedule,
        "train": {"steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2} | train,
        "evaluate": {"window": WINDOW, "max_windows": WINDOWS, "batch_size": 5, **case.evaluate},
    }


STRANGER = """
import json, sys
import torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer

@torch.no_grad()
def perplexity(folder, trust, text, window, count):
    trust = {"trust_remote_code": True} if trust else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **trust).eval()
    tokens = torch.tensor(AutoTokenizer.from_pretrained(folder, **trust)(text).input_ids)
    windows = tokens[: len(tokens) // window * window].view(-1, window)[:count]
    log_probabilities = model(windows).logits.double().log_softmax(-1)[:, :-1]
    chosen = log_probabilities.gather(-1, windows[:, 1:, None])
    return {"perplexity": (-chosen.mean()).exp().item(), "windows": len(windows), "dtype": str(model.dtype)}

job = json.loads(sys.argv[1])
text = Path(job["text"]).read_text()
result = {name: perplexity(folder, trust, text, job["window"], job["count"]) for name, folder, trust in job["models"]}
print("RESULT " + json.dumps(result))
"""


def perplexities(runs: dict[str, Run], root: Path) -> dict[str, dict[str, Any]]:
    """Returns held-out perplexity of every case's model before ("<case>_dense") and after, by plain transformers."""
    folders = {name: run.folder / "model" for name, run in runs.items()}
    folders |= {f"{name}_dense": run.source for name, run in runs.items()}
    models = [
        (name, str(folder), any(folder.glob("modeling_*.py"))) for name, folder in folders.items()
    ]
    job = {"models": models, "text": str(root / "held_out.txt"), "window": WINDOW, "count": WINDOWS}
    return json.loads(ask_stranger(STRANGER, json.dumps(job), folder=root).partition("RESULT ")[2])


def nearest_rows(rows: Tensor, among: Tensor) -> list[int]:
    """Finds, for every row of (n, width), the number of the most similar row among (m, width)."""
    return torch.cdist(rows.float(), among.float()).argmin(1).tolist()


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Maps each name in a folder to (time of the last change in ns, size)."""
    stats = {str(path.relative_to(folder)): os.stat(path) for path in folder.rglob("*")}
    return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}
