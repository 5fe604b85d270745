"""Writes report.json and kept_groups.json: the results of a run as data, with versions and hardware."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from loraprune_ds.errors import fail_point
from loraprune_ds.files import JsonObject, write_json, write_text
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report import records
from loraprune_ds.report.measured import Measured, text_basis
from loraprune_ds.report.pictures import PANELS, draw_kept_groups, draw_training
from loraprune_ds.units import format_count
from loraprune_ds.versions import can_show, installed

CHECKOUT = Path(__file__).resolve().parents[2]  # if the package runs from one
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "loraprune_ds")
RESULTS = "tests/benchmarks/results"  # a benchmark's output, not its code


@dataclass(frozen=True)
class Outcome:
    """Describes a run after its training."""

    config: JsonObject
    history: records.History
    schedule: Schedule
    pruned: ModelShape
    kept_of_dense: list[LayerKeep]  # per layer, the kept groups as indices into the dense model
    resumed_from: list[int]  # the steps at which the run was resumed
    accelerator: str  # the name of the ranks' device
    peak_bytes: list[int]  # of each rank


def write_results(folder: Path, outcome: Outcome) -> list[Path]:
    """Writes report, kept groups and pictures, and returns the pictures. None without matplotlib."""
    training_picture = folder / records.TRAINING_PICTURE
    groups_picture = folder / records.KEPT_GROUPS_PICTURE
    dense = outcome.schedule.limits.dense
    write_kept_groups(folder, outcome.kept_of_dense, dense)
    write_json(folder / records.REPORT_FILE, make_report(outcome))
    fail_point("finish.reported")
    if not can_show("matplotlib"):
        return []
    draw_training(training_picture, outcome.history)
    draw_kept_groups(groups_picture, dense, outcome.kept_of_dense)
    return [training_picture, groups_picture]


def make_report(outcome: Outcome) -> JsonObject:
    """Makes the content of report.json."""
    dense = outcome.schedule.limits.dense
    history = outcome.history
    evaluations = ("dense", "after_last_cut", "pruned")
    return {
        "measured": asdict(_measured(outcome)),
        "start": _numels(dense),
        "asked_ratio": outcome.schedule.goal.ratio,
        "target": describe_target(outcome.schedule.goal.config, dense, outcome.pruned),
        "perplexity": {name: history.perplexity(name) for name in evaluations},
        "world_size": len(outcome.peak_bytes),
        "steps": history.steps[-1].step if history.steps else 0,
        "prune_steps": [_without_counts(cut) for cut in history.cuts],
        "peak_memory_bytes": outcome.peak_bytes,
        "seed": outcome.config["seed"],
        "resumed_from": outcome.resumed_from,
        "versions": versions(),
        "hardware": hardware(outcome.accelerator),
        "config": outcome.config,
    }


def _without_counts(cut: records.CutRecord) -> JsonObject:
    """Returns a cut without the lists that have an entry per layer."""
    return {name: value for name, value in asdict(cut).items() if name not in PANELS}


def _measured(outcome: Outcome) -> Measured:
    """Returns what users compare models by, beside the dense model that a chain of runs began with.

    Parameters are without LoRA, and a tied tensor counts once. That model's perplexity is the first run's to tell.
    """
    history = outcome.history
    config = outcome.config
    prune = outcome.schedule.goal.config
    dense = outcome.schedule.limits.dense
    first = dense.first
    of_dense = {"parameters": first["parameters"], "linear parameters": first["linear_parameters"]}
    method = f"{prune.criterion}, {prune.ranking}"
    dense_perplexity = history.perplexity("dense")
    if "name" in first:
        method += f", from {format_count(dense.total_numel())}"
        dense_perplexity = None
    numel = outcome.pruned.total_numel()
    measured = Measured(
        name=records.MODEL_FOLDER,
        method=method,
        parameters=numel,
        removed=1 - numel / first["parameters"],
    )
    measured.add("", _numels(outcome.pruned), of_dense)
    if "data" in config:  # and no other trainer's
        text = _held_out(config["data"])
        basis = text_basis(text, config["evaluate"], config["model"]["dtype"])
        found = {"perplexity": history.perplexity("pruned")}
        measured.add(basis, found, {"perplexity": dense_perplexity})
    return measured


def _numels(shape: ModelShape) -> dict[str, float]:
    return {"parameters": shape.total_numel(), "linear parameters": shape.linear_numel()}


def _held_out(data: JsonObject) -> str:
    """Names the text that a run held out: a file, or a part of its sources."""
    if data["held_out"]:
        return data["held_out"]
    sources = [data] if isinstance(data["path"], str) else data["path"]
    names: list[str] = []
    for source in sources:
        words = [source.get(key) for key in ("path", "name", "split")]
        names.append(" ".join(word for word in words if word and word != "train"))
    percent = 100 * data["held_out_fraction"]
    return f"a held-out {percent:g} % of {' + '.join(names)}"


def write_kept_groups(folder: Path, kept_of_dense: Sequence[LayerKeep], dense: ModelShape) -> None:
    """Writes a line per layer: the kept groups as indices into the dense model, and the dense number.

    `heads` are key-value heads, with all query heads that read them.
    """
    lines: list[str] = []
    for keep, counts in zip(kept_of_dense, dense.counts, strict=True):
        groups = {kind: indices.tolist() for kind, indices in keep.items()}
        dense_counts = {f"{kind}_dense": counts[kind] for kind in keep}
        lines.append(json.dumps(groups | dense_counts, sort_keys=True))
    layers = ",\n".join(lines)
    path = folder / records.KEPT_GROUPS_FILE
    write_text(path, f'{{"layers": [\n{layers}\n]}}\n')


def versions() -> dict[str, str | None]:
    """Returns the installed versions, and the commit if this is a git checkout."""
    packages = {name: installed(name) for name in PACKAGES}
    return packages | {"python": platform.python_version(), "commit": commit(CHECKOUT)}


def commit(checkout: Path) -> str | None:
    """Returns the commit, with `-dirty` if files other than results have changed. None without git or a checkout."""
    if not (checkout / ".git").exists():  # an installed copy may be inside another repository
        return None
    head = _git(checkout, "rev-parse", "HEAD")
    changed = _git(checkout, "diff", "--name-only", "HEAD", "--", ".", f":(exclude){RESULTS}")
    return head if head is None or changed == "" else f"{head}-dirty"


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def hardware(accelerator: str) -> JsonObject:
    """Describes this machine. `instructions` are the widest ones that torch uses, for example "AVX2"."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": accelerator,
    }
