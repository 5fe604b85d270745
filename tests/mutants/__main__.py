"""Plants each bug in a copy of the tree and runs its killer, then the fast tier if the killer missed it.

python -m tests.mutants [NAME or topic …]     prints who saw each; fails if one survives
python -m tests.mutants --list                names them, one a line
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from queue import Queue

from tests.mutants.plant import Mutant, all_mutants
from tests.mutants.trees import copy_tree, first_failure, load_libraries, planted

# test_mutants sees that a statement is gone, whatever it does
FAST = ("@tests/fast.txt", "--deselect=tests/unit/test_mutants.py")
SURVIVES = "SURVIVES"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants or topics")
    parser.add_argument("--list", action="store_true", help="name them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at the same time")
    arguments = parser.parse_args()
    mutants = _chosen(arguments.names)
    for mutant in mutants:
        mutant.check()
    if arguments.list:
        print(*(f"{mutant.name:36} {mutant.effect}" for mutant in mutants), sep="\n")
        return 0
    return _run(mutants, min(arguments.jobs, len(mutants)))


def _chosen(names: Sequence[str]) -> list[Mutant]:
    mutants = all_mutants()
    unknown = set(names) - {x for mutant in mutants for x in (mutant.name, mutant.topic)}
    if unknown:
        sys.exit(f"no mutant or topic is named {', '.join(sorted(unknown))}; see --list")
    return [x for x in mutants if not names or {x.name, x.topic} & set(names)]


def _run(mutants: Sequence[Mutant], jobs: int) -> int:
    began = time.monotonic()
    load_libraries()
    context = get_context("fork")
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free: Queue[Path] = context.Manager().Queue()
        for tree in (Path(folder) / str(number) for number in range(jobs)):
            copy_tree(tree)
            free.put(tree)
        killers = sorted({mutant.killer for mutant in mutants})
        failure = first_failure(Path(folder) / "0", killers, skips_fail=True)
        if failure is not None:
            print(f"On the unchanged code {failure} does not pass")
            return 1
        with ProcessPoolExecutor(jobs, context) as pool:
            dead = list(pool.map(partial(_judge, free), mutants))
    minutes = (time.monotonic() - began) / 60
    print(f"{sum(dead)} of {len(mutants)} are dead, after {minutes:.1f} minutes")
    return 0 if sum(dead) == len(mutants) else 1


def _judge(free: "Queue[Path]", mutant: Mutant) -> bool:
    """Prints who sees a mutant. Returns whether anybody does."""
    began = time.monotonic()
    tree = free.get()
    try:
        with planted(mutant, tree):
            seen = first_failure(tree, [mutant.killer])
            if seen is None:
                failure = first_failure(tree, FAST)
                seen = f"not by its killer, by {failure}" if failure else SURVIVES
    finally:
        free.put(tree)
    print(f"{mutant.name:36} {time.monotonic() - began:4.0f} s  {seen}", flush=True)
    return seen != SURVIVES


if __name__ == "__main__":
    sys.exit(main())
