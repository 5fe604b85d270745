"""Builds the wheel and installs it where nothing of this checkout is found."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.integration.launching import ROOT, clean_environment

SOURCES = ("pyproject.toml", "loraprune_ds", "launch", "ds_configs")


def build_wheel(folder: Path) -> Path:
    """Builds it from a copy, since a build leaves folders behind. The build tools are those of this Python."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    _run(sys.executable, "-m", "pip", "wheel", *options, str(copy))
    shutil.rmtree(copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, environment: Path) -> Path:
    """Makes an environment of the wheel, beside the other packages of this Python. Returns its folder of programs."""
    _run(sys.executable, "-m", "venv", "--without-pip", str(environment))
    python = environment / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file comes last, and the .pth files in there are not read. So this checkout stays unknown.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def without_checkout() -> dict[str, str]:
    return {key: value for key, value in clean_environment().items() if key != "PYTHONPATH"}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=without_checkout())
    assert done.returncode == 0, done.stdout + done.stderr
