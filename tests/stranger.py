"""Runs a program in a fresh process that has transformers but not this package."""

import os
import subprocess
import sys
from pathlib import Path

OTHER_TRANSFORMERS = os.environ.get("OTHER_TRANSFORMERS")  # a folder with another version (tests/run_heavy.sh)
WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loraprune_ds":
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""


def ask_stranger(program: str, *arguments: str | Path, folder: Path) -> str:
    """Returns the output of a program that runs in an empty folder inside `folder`."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere)}
    if OTHER_TRANSFORMERS:
        environment["PYTHONPATH"] = OTHER_TRANSFORMERS
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE + program, *map(str, arguments)],
        cwd=elsewhere,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout
