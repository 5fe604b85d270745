"""Writes report.json and kept_groups.json: the results of a run as data, with versions and hardware."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from loraprune_ds.errors import fail_point
from loraprune_ds.files import JsonObject, write_json, write_text
from loraprune_ds.model.groups import LayerCounts, LayerKeep
from loraprune_ds.model.shape import ModelShape, cached_numel
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report import records
from loraprune_ds.report.pictures import PANELS, draw_kept_groups, draw_shelf, draw_training
from loraprune_ds.versions import can_show, installed

# inputs that share a scale in AWQ, GPTQ, Marlin and GGUF's q8_0
QUANTISATION_GROUPS = (128, 64, 32)
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
    shelf_picture = folder / records.SHELF_PICTURE
    dense = outcome.schedule.limits.dense
    write_kept_groups(folder, outcome.kept_of_dense, dense)
    report = make_report(outcome, {})
    write_json(folder / records.REPORT_FILE, report)
    fail_point("finish.reported")
    if not can_show("matplotlib"):
        return []
    draw_training(training_picture, outcome.history)
    draw_kept_groups(groups_picture, dense, outcome.kept_of_dense)
    pictures = [training_picture, groups_picture]
    if draw_shelf(shelf_picture, report["shelf"], report["perplexity"]["dense"]):
        pictures.append(shelf_picture)
    return pictures


def make_report(outcome: Outcome, sizes: dict[int, str]) -> JsonObject:
    """Makes the content of report.json. `sizes`: last step -> name of each of `prune.sizes` that was exported."""
    dense = outcome.schedule.limits.dense
    history = outcome.history
    evaluations = ("dense", "after_last_cut", "pruned")
    return {
        "params": _parameters(dense, outcome.pruned, outcome.schedule.ratio),
        "target": describe_target(outcome.schedule.config, dense, outcome.pruned),
        "shelf": list(_shelf(dense, history, sizes)),
        "serving": _serving(outcome.pruned),
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


def _parameters(dense: ModelShape, pruned: ModelShape, ratio: float) -> dict[str, float]:
    """Counts parameters without LoRA. A tied tensor counts once."""
    total = dense.total_numel()
    total_pruned = pruned.total_numel()
    return {
        "dense": total,
        "pruned": total_pruned,
        "removed_fraction": 1 - total_pruned / total,
        "linear_dense": dense.linear_numel(),
        "linear_pruned": pruned.linear_numel(),
        "linear_asked_fraction": ratio,
    }


def _without_counts(cut: records.CutRecord) -> JsonObject:
    """Returns a cut without the lists that have an entry per layer."""
    return {name: value for name, value in asdict(cut).items() if name not in PANELS}


def _shelf(
    dense: ModelShape, history: records.History, sizes: dict[int, str]
) -> Iterator[JsonObject]:
    """Yields a row per size, in order. KV bytes are per token, in 16 bits."""
    for step, size in sizes.items():
        cuts = [cut for cut in history.cuts if cut.step <= step]
        # there is no cut if no group could leave
        shape = _cut_shape(dense, cuts[-1]) if cuts else dense
        numel = shape.total_numel()
        tokens = sum(s.tokens for s in history.steps if s.step <= step)
        name = "pruned" if step == max(sizes) else "size"
        yield {
            "size": size,
            "folder": records.export_folder(sizes, step),
            "step": step,
            "tokens": tokens,
            "parameters": numel,
            "removed_fraction": 1 - numel / dense.total_numel(),
            "kv_bytes_per_token": 2 * cached_numel(shape),
            "perplexity": history.perplexity(name, step),
        }


def _cut_shape(dense: ModelShape, cut: records.CutRecord) -> ModelShape:
    # heads [4, 2] and channels [8, 6] of two layers -> (4, 8), (2, 6)
    layers = zip(*(getattr(cut, kind) for kind in dense.kinds), strict=True)
    return dense.resized([LayerCounts(zip(dense.kinds, counts, strict=True)) for counts in layers])


def _serving(pruned: ModelShape) -> dict[str, list[int]]:
    """Returns the tensor-parallel sizes and the quantisation groups that divide every layer."""
    # a server splits an expert by channels
    divisor = pruned.mixture.expert_size if pruned.mixture else 0
    for layer in pruned.counts:
        widths = [count for kind, count in layer.items() if kind != "experts"]
        divisor = math.gcd(divisor, *widths)
    inputs = math.gcd(*(linear.inputs for _, linear in pruned.linears()))
    divisors = [n for n in range(1, divisor + 1) if divisor % n == 0]
    return {
        "tensor_parallel": list(filter(pruned.has_heads_for, divisors)),
        "quantisation_groups": [size for size in QUANTISATION_GROUPS if inputs % size == 0],
    }


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
