"""Prints the test files that import what has changed since a commit, or that name a changed file.

python -m tests.changed COMMIT
"""

import subprocess
import sys
from pathlib import Path

from tests.support.imports import imports_between, module_of
from tests.support.launching import ROOT

FOLDERS = ("loraprune_ds", "launch", "slurm", "tests")


def changed_since(commit: str) -> list[Path]:
    """Lists changed files, and new ones that git does not ignore."""
    commands = (["diff", "--name-only", commit], ["ls-files", "--others", "--exclude-standard"])
    names: list[str] = []
    for command in commands:
        done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, check=True)
        names += done.stdout.decode().split()
    return [ROOT / name for name in names]


def tests_of(changed: list[Path]) -> list[Path]:
    """Lists the test files that reach changed modules by imports, or whose text names another changed file."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    imports = imports_between(files)
    for path in files:  # pytest imports it for them
        if path.name == "conftest.py":
            for other in path.parent.rglob("test_*.py"):
                imports[module_of(other)].add(module_of(path))
    reached = {module_of(path) for path in changed if path.suffix == ".py"}
    others = {path.name for path in changed if path.suffix != ".py"}
    for path in files:
        if others and any(name in path.read_text() for name in others):
            reached.add(module_of(path))
    count = 0
    while count < len(reached):
        count = len(reached)
        reached |= {module for module, named in imports.items() if named & reached}
    return [path for path in files if path.name.startswith("test_") and module_of(path) in reached]


if __name__ == "__main__":
    lines = [path.relative_to(ROOT).as_posix() for path in tests_of(changed_since(sys.argv[1]))]
    sys.stdout.write("\n".join(lines or ["tests/unit/test_layering.py"]) + "\n")
