"""What the commands share: ranks, arguments, errors and exits."""

import argparse
import logging
import os
import re
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import NoReturn

from loraprune_ds.errors import RankError, UserError

GRACE = 5.0  # seconds that the other ranks stay after an error


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong arguments like any other wrong input. Its help shows the command that was typed."""

    def __init__(
        self, description: str | None, parents: Sequence[argparse.ArgumentParser] = (), *, add_help: bool = True
    ) -> None:
        super().__init__(
            sys.argv[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=parents,
            add_help=add_help,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def adopt_srun_ranks() -> None:
    """Sets the environment variables that a launcher would set, if srun starts every rank without one."""
    if "RANK" not in os.environ:
        os.environ |= srun_ranks(os.environ)


def srun_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, LOCAL_RANK, WORLD_SIZE and a meeting point from srun's variables. Outside a job step it is empty.

    SLURM_NTASKS is not enough: a batch script has it too, and its commands without srun are one process.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        return {}
    nodes = re.split(r",(?![^\[]*\])", environment["SLURM_STEP_NODELIST"])  # gpu[01-04,7],login -> gpu[01-04,7]
    first_node = re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[0])  # -> gpu01, which has task 0. scontrol may be missing
    port = 20_000 + (int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])) % 12_000
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first_node),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def tell(error: UserError, *, agreed: bool = True) -> None:
    """Prints an error in one line: rank 0 for all ranks, or a rank that met it alone.

    The first rank that exits makes the launcher end the others, so those wait until rank 0 has printed. A rank that is
    still alive then prints its error, unless the ranks `agreed` on it.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(GRACE)
        if agreed and not isinstance(error, RankError):
            return
    sys.stderr.write(f"error: {error}\n" if rank == "0" else f"error on rank {rank}: {error}\n")
    sys.stderr.flush()


def silence_libraries() -> None:
    """Silences the libraries. Must run before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else every rank tells of every retry
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    # DeepSpeed's logger prints to stdout, from its import on. It sets its own level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def leave(code: int) -> NoReturn:
    """Ends this process immediately. An interpreter that shuts down can abort in a thread of gloo (exit code -6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_on_error() -> None:
    """Makes an unexpected error end this process right after its traceback.

    While an interpreter shuts down it can wait for the other ranks, which wait for this one, while the launcher waits
    for its exit code.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # torch calls this hook with sys.stderr pointing at a buffer, which would be lost here.
        text = "".join(traceback.format_exception(kind, error, trace))
        if os.environ.get("WORLD_SIZE", "1") != "1":
            text = textwrap.indent(text, f"[rank {os.environ.get('RANK', '0')}] ")
        try:
            os.write(2, text.encode(errors="backslashreplace"))
        finally:  # also if the reader of stderr is gone
            os._exit(1)

    sys.excepthook = hook
