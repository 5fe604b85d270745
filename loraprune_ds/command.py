"""What the commands in launch/ share: how they learn their rank, read arguments, tell an error and end."""

import argparse
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import NoReturn

from loraprune_ds.errors import RankError, UserError

GRACE = 5.0  # seconds that the other ranks stay after an error


class Parser(argparse.ArgumentParser):
    """Wrong arguments are told like any other wrong input: by one rank, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def adopt_srun_ranks() -> None:
    """Without a launcher, started by srun once per rank: puts into the environment what a launcher would have."""
    if "RANK" not in os.environ:
        os.environ |= srun_ranks(os.environ)


def srun_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE and a meeting point from what srun tells its tasks; empty outside a job step.

    Not from SLURM_NTASKS, which a batch script has as well: what it runs without srun is one process, not so many.
    MASTER_ADDR and MASTER_PORT that are set already stay.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    nodes = re.split(r",(?![^\[]*\])", environment["SLURM_STEP_NODELIST"])  # gpu[01-04,7],login -> gpu[01-04,7]
    first_node = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[0])  # -> gpu01, which has task 0; scontrol may be missing here
    port = 20_000 + (int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % 12_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def tell(error: UserError, *, agreed: bool = True) -> None:
    """One line from rank 0 about what all ranks met.

    The first rank that leaves makes the launcher end the others, so those wait until rank 0 has spoken. A rank still
    alive after that met an error of its own, unless the ranks had `agreed` on it, and tells it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        _say(f"error: {error}")
        return
    time.sleep(GRACE)
    if not agreed or isinstance(error, RankError):
        _say(f"error on rank {rank}: {error}")


def silence_libraries() -> None:
    """Leaves only what the command itself has to say. Before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # every rank would tell of every retry
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    # DeepSpeed's logger prints to stdout, its first words while it is imported, and sets its own level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def leave(code: int) -> NoReturn:
    """Ends this process without taking the interpreter down, which now and then aborts in a thread of gloo's (-6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_on_error() -> None:
    """From now on an error that nobody expected ends this process right after its traceback.

    An interpreter that is taken down first can wait for other ranks, which wait for this one; the launcher, who ends
    them all, waits for its exit code.
    """

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        sys.__excepthook__(kind, error, traceback)
        leave(1)

    sys.excepthook = hook


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
