"""Names the versions, commit and hardware that a result comes from."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).resolve().parents[2]  # if this is one
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "loraprune_ds")
RESULTS = "tests/benchmarks/results"  # a benchmark writes them, they do not change it


def versions() -> dict[str, str | None]:
    """Returns the installed versions, and the commit if this is a git checkout."""
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
    """Returns the commit, with `-dirty` if files other than results have changed. None without git or a checkout.

    The repository must begin right here, because an installed copy may lie inside another one.
    """
    if not (checkout / ".git").exists():
        return None
    head = _git(checkout, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(checkout, "diff", "--name-only", "HEAD", "--", ".", f":(exclude){RESULTS}")
    return head if changed == "" else f"{head}-dirty"


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def hardware(accelerator: str) -> dict[str, Any]:
    """Describes this machine. `instructions` are the widest ones that torch uses, for example "AVX2"."""
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
