"""Where a result comes from: versions, commit, hardware."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.config_file import CHECKOUT

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "loraprune_ds")
RESULTS = "tests/benchmarks/results"  # what a benchmark writes is not what it ran


def versions() -> dict[str, str | None]:
    """Installed versions, Python's, and the commit if this is a git checkout."""
    return {name: _version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "commit": commit(CHECKOUT),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit(checkout: Path) -> str | None:
    """The commit, with `-dirty` if files were changed since, results apart; None where git or a checkout is missing.

    Only a repository that begins right here counts: an installed copy may lie inside somebody else's.
    """
    if not (checkout / ".git").exists():
        return None
    head = _git(checkout, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(checkout, "diff", "--name-only", "HEAD", "--", ".", f":(exclude){RESULTS}")
    return head if changed == "" else f"{head}-dirty"


def _git(checkout: Path, *arguments: str) -> str | None:
    """What git answers; None if it is missing or refuses."""
    try:
        answer = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def hardware(accelerator: str) -> dict[str, Any]:
    """This machine (rank 0's): CPU model, its widest instructions that torch uses ("AVX2"), the cores this process may
    use, and the accelerator's name."""
    return {
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "accelerator": accelerator,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
