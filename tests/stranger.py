"""Runs a program in a fresh process that has transformers but not this package."""

import os
import sys
from pathlib import Path

from tests.integration.launching import run_to_end

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
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(elsewhere), "PYTHONPATH": OTHER_TRANSFORMERS or ""}
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE + program, *map(str, arguments)]
    return run_to_end(command, cwd=elsewhere, environment=environment, timeout=900).check().out
