"""Copies of the tree, and pytest in them. Each is a fork of a process that has the libraries: 5 s less."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from tests.mutants.plant import Mutant
from tests.support.launching import ROOT

LIBRARIES = ("torch", "deepspeed", "peft", "datasets", "accelerate", "transformers.trainer")
OURS = ("tests", "loraprune_ds")
SECONDS = 240  # of a test: a bug may make ranks wait for ever
SEEN = re.compile(r"^(?:FAILED|ERROR|SKIPPED) (?:\[\d+\] )?(.+?)(?: - .*)?$", re.MULTILINE)


def load_libraries() -> None:
    """Imports what most tests import, but nothing of this package."""
    importlib.import_module("tests.conftest")  # sets what libraries read at import
    for name in LIBRARIES:
        importlib.import_module(name)


def copy_tree(tree: Path) -> None:
    """Copies what git has, and what it would take."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)


@contextmanager
def planted(mutant: Mutant, tree: Path) -> Iterator[None]:
    """Has the bug in the tree."""
    path = tree / mutant.path
    source = path.read_text()
    path.write_text(mutant.mutate(source))
    try:
        yield
    finally:
        path.write_text(source)


def first_failure(tree: Path, tests: Sequence[str], *, skips_fail: bool = False) -> str | None:
    """Runs tests in a tree. Returns the name of the first that fails, or None."""
    log = tree.with_suffix(".log")
    child = os.fork()
    if child == 0:
        _become_pytest(tree, tests, log)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    printed = log.read_text()
    found = SEEN.search(printed) if code or skips_fail else None
    if code == 0 and found is None:
        return None
    if found is None and code not in (1, -9):
        raise RuntimeError(f"pytest could not run {' '.join(tests)}:\n{printed}")
    return found[1] if found else tests[0]


def _become_pytest(tree: Path, tests: Sequence[str], log: Path) -> NoReturn:
    os.setsid()  # some tests end their process group
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    main = sys.modules["__main__"]
    main.__spec__ = None  # processes that tests start must not import this command
    main.__dict__.pop("__file__", None)
    sys.path.insert(0, str(tree))
    tempfile.tempdir = str(tree.parent)
    sys.dont_write_bytecode = True  # two bugs in a second would have one name
    os.environ |= {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": tempfile.tempdir,
    }
    options = ["-x", "-m", "", "--tb=no", "-rfEs", "-p", "no:cacheprovider", f"--timeout={SECONDS}"]
    code = 1
    try:
        code = pytest.main([*options, *tests])
    finally:
        sys.stdout.flush()
        os._exit(code)
