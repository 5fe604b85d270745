"""Writes report.json and kept_groups.json: the results of a run as data, with versions and hardware."""

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.errors import fail_point
from loraprune_ds.files import write_json, write_text
from loraprune_ds.model.groups import QUERY_HEADS, LayerCounts, LayerKeep
from loraprune_ds.model.shape import ModelShape, cached_numel
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report import records
from loraprune_ds.report.pictures import draw_kept_groups, draw_shelf, draw_training

# a cut record counts these per layer
KINDS = ("heads", QUERY_HEADS, "channels", "experts", "delta", "cross_heads")
# inputs that share a scale in AWQ, GPTQ, Marlin and GGUF's q8_0
QUANTISATION_GROUPS = (128, 64, 32)
CHECKOUT = Path(__file__).resolve().parents[2]  # if the package runs from one
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "loraprune_ds")
RESULTS = "tests/benchmarks/results"  # a benchmark's output, not its code


@dataclass(frozen=True)
class Outcome:
    """Describes a run after its training."""

    config: dict[str, Any]
    history: records.History
    schedule: Schedule
    pruned: ModelShape
    kept_of_dense: list[LayerKeep]  # per layer, the kept groups as indices into the dense model
    resumed_from: list[int]  # the steps at which the run was resumed
    accelerator: str  # the name of the ranks' device
    peak_bytes: list[int]  # of each rank


def write_results(folder: Path, outcome: Outcome) -> list[Path]:
    """Writes report, kept groups and pictures, and returns the pictures."""
    pictures = [folder / records.TRAINING_PICTURE, folder / records.KEPT_GROUPS_PICTURE]
    dense, ends = outcome.schedule.limits.dense, outcome.schedule.ends()
    write_kept_groups(folder, outcome.kept_of_dense, dense)
    # The last size is the run's own model.
    made = {
        n: size
        for n, size in ends.items()
        if n == max(ends) or (folder / records.export_folder(ends, n)).is_dir()
    }
    report = make_report(outcome, made)
    write_json(folder / records.REPORT_FILE, report)
    fail_point("finish.reported")
    draw_training(pictures[0], outcome.history)
    draw_kept_groups(pictures[1], dense, outcome.kept_of_dense)
    shelf = folder / records.SHELF_PICTURE
    if draw_shelf(shelf, report["shelf"], report["perplexity"]["dense"]):
        pictures.append(shelf)
    return pictures


def make_report(outcome: Outcome, sizes: dict[int, str]) -> dict[str, Any]:
    """Makes the content of report.json. `sizes`: last step -> name of each of `prune.sizes` that was exported."""
    dense, pruned, resumed_from = (
        outcome.schedule.limits.dense,
        outcome.pruned,
        outcome.resumed_from,
    )
    history, steps, cuts = outcome.history, outcome.history.steps, outcome.history.cuts
    steps_before = [s for s in steps if not cuts or s.step <= cuts[0].step]
    steps_after = [s for s in steps if cuts and s.step > cuts[-1].step]
    before, after = next(reversed(steps_before), None), steps[-1] if steps and cuts else None
    return {
        "params": {  # without LoRA. A tied tensor counts once
            "dense": dense.total_numel(),
            "pruned": pruned.total_numel(),
            "removed_fraction": 1 - pruned.total_numel() / dense.total_numel(),
            "linear_dense": dense.linear_numel(),
            "linear_pruned": pruned.linear_numel(),
            "linear_asked_fraction": outcome.schedule.ratio,
        },
        "target": describe_target(outcome.schedule.config, dense, pruned),
        "shelf": [*_shelf(dense, history, sizes)],
        "serving": _serving(pruned),
        "perplexity": {
            name: history.perplexity(name) for name in ("dense", "after_last_cut", "pruned")
        },
        "world_size": len(outcome.peak_bytes),
        "steps": steps[-1].step if steps else 0,
        "prune_steps": [{k: v for k, v in asdict(cut).items() if k not in KINDS} for cut in cuts],
        "seconds_per_step": {
            "before": _seconds_per_step(steps_before, resumed_from),
            "after": _seconds_per_step(steps_after, resumed_from),
        },
        "resident_bytes": {
            "before": before and before.resident_bytes,
            "after": after and after.resident_bytes,
        },
        "step_peak_bytes": {
            "before": _step_peak(_without_refit(steps_before, outcome.schedule), resumed_from),
            "after": _step_peak(steps_after, resumed_from),
        },
        "reserved_bytes": steps[-1].reserved_bytes if steps else [],
        "mfu": {"before": before and before.mfu, "after": after and after.mfu},
        "peak_memory_bytes": outcome.peak_bytes,
        "seed": outcome.config["seed"],
        "resumed_from": resumed_from,
        "versions": versions(),
        "hardware": hardware(outcome.accelerator),
        "config": outcome.config,
    }


def _shelf(
    dense: ModelShape, history: records.History, sizes: dict[int, str]
) -> Iterator[dict[str, Any]]:
    """Yields a row per size, in order. KV bytes are per token, in 16 bits."""
    for step, size in sizes.items():
        cuts = [cut for cut in history.cuts if cut.step <= step]
        shape = dense  # there is no cut if no group could leave
        if cuts:
            layers = zip(*(getattr(cuts[-1], kind) for kind in dense.kinds), strict=True)
            shape = dense.resized(
                [LayerCounts(zip(dense.kinds, counts, strict=True)) for counts in layers]
            )
        name = "pruned" if step == max(sizes) else "size"
        measured = [e for e in history.evaluations if e.step == step and e.name == name]
        yield {
            "size": size,
            "folder": records.export_folder(sizes, step),
            "step": step,
            "tokens": sum(s.tokens for s in history.steps if s.step <= step),
            "parameters": shape.total_numel(),
            "removed_fraction": 1 - shape.total_numel() / dense.total_numel(),
            "kv_bytes_per_token": 2 * cached_numel(shape),
            "perplexity": measured[-1].perplexity if measured else None,
        }


def _serving(pruned: ModelShape) -> dict[str, list[int]]:
    """Returns the tensor-parallel sizes and the quantisation groups that divide every layer."""
    divided = [
        count for layer in pruned.counts for kind, count in layer.items() if kind != "experts"
    ]
    expert_size = pruned.mixture.expert_size if pruned.mixture else 0
    together = math.gcd(expert_size, *divided)  # a server splits an expert by channels
    inputs = math.gcd(*(linear.inputs for _, linear in pruned.linears()))
    return {
        "tensor_parallel": [
            n for n in range(1, together + 1) if together % n == 0 and pruned.has_heads_for(n)
        ],
        "quantisation_groups": [size for size in QUANTISATION_GROUPS if inputs % size == 0],
    }


def _without_refit(
    steps: Sequence[records.StepRecord], schedule: Schedule
) -> Sequence[records.StepRecord]:
    """Leaves out steps that record inputs for a refit, which takes memory. If all do, all stay."""
    prune = schedule.config
    plain = [s for s in steps if not schedule.precedes_cut(s.step, prune.compensate_steps)]
    return steps if prune.compensate == "none" else plain or steps


def _step_peak(steps: Sequence[records.StepRecord], resumed_from: Sequence[int]) -> int | None:
    """Returns the median peak of the fullest rank, excluding the first step of every process."""
    peaks = [
        max(s.peak_bytes)
        for s in _after_warm_up(steps, resumed_from)
        if s.peak_bytes and all(s.peak_bytes)
    ]
    return int(statistics.median(peaks)) if peaks else None


def _seconds_per_step(
    steps: Sequence[records.StepRecord], resumed_from: Sequence[int]
) -> float | None:
    """Returns the median, excluding skipped steps and the first step of every process."""
    times = [s.seconds for s in _after_warm_up(steps, resumed_from) if not s.skipped]
    return statistics.median(times) if times else None


def _after_warm_up(
    steps: Sequence[records.StepRecord], resumed_from: Sequence[int]
) -> list[records.StepRecord]:
    warm_up = {1, *(step + 1 for step in resumed_from)}
    return [s for s in steps if s.step not in warm_up]


def write_kept_groups(folder: Path, kept_of_dense: Sequence[LayerKeep], dense: ModelShape) -> None:
    """Writes a line per layer: the kept groups as indices into the dense model, and the dense number.

    `heads` are key-value heads, with all query heads that read them.
    """
    layers = [
        {kind: groups.tolist() for kind, groups in keep.items()}
        | {f"{kind}_dense": n for kind, n in layer.items()}
        for keep, layer in zip(kept_of_dense, dense.counts, strict=True)
    ]
    lines = ",\n".join(json.dumps(layer, sort_keys=True) for layer in layers)
    write_text(folder / records.KEPT_GROUPS_FILE, f'{{"layers": [\n{lines}\n]}}\n')


def versions() -> dict[str, str | None]:
    """Returns the installed versions, and the commit if this is a git checkout."""
    installed = {
        name: next((found.version for found in distributions(name=name)), None) for name in PACKAGES
    }
    return installed | {"python": platform.python_version(), "commit": commit(CHECKOUT)}


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


def hardware(accelerator: str) -> dict[str, Any]:
    """Describes this machine. `instructions` are the widest ones that torch uses, for example "AVX2"."""
    fields = (
        line.partition(":")
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    )
    models = (value.strip() for key, _, value in fields if key.startswith("model name"))
    return {
        "cpu": next(models, platform.processor() or platform.machine()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": accelerator,
    }
