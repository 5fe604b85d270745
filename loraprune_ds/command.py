"""Holds the parts that the commands in launch/ share: ranks, arguments, errors and exits."""

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
    """A parser that tells wrong arguments like any other wrong input: by one rank, in one line.

    Its help shows the command as it was typed, such as `launch/plan.py` or `loraprune-ds plan`.
    """

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
    """Puts into the environment what a launcher would put there, when srun starts every rank without one."""
    if "RANK" not in os.environ:
        os.environ |= srun_ranks(os.environ)


def srun_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns RANK, LOCAL_RANK, WORLD_SIZE and a meeting point from what srun tells its tasks.

    Outside a job step the result is empty. SLURM_NTASKS does not count: a batch script has it too, and what the script
    runs without srun is one process. MASTER_ADDR and MASTER_PORT stay if they are set.
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

    The first rank that leaves makes the launcher end the others. So those wait until rank 0 has spoken. A rank that is
    alive after that tells its error, unless the ranks `agreed` on it.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        _say(f"error: {error}")
        return
    time.sleep(GRACE)
    if not agreed or isinstance(error, RankError):
        _say(f"error on rank {rank}: {error}")


def silence_libraries() -> None:
    """Silences all but the command itself. Must run before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else every rank tells of every retry
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    # DeepSpeed's logger prints to stdout, from its import on. It sets its own level.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def leave(code: int) -> NoReturn:
    """Ends this process at once. An interpreter that shuts down can abort in a thread of gloo (exit code -6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_on_error() -> None:
    """Makes an unexpected error end this process right after its traceback.

    An interpreter that shuts down first can wait for the other ranks. They wait for this one. The launcher would end
    them all, but it waits for this one's exit code.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # torch calls this hook with sys.stderr pointing at a buffer, which would be lost here.
        text = _marked("".join(traceback.format_exception(kind, error, trace)))
        try:
            os.write(2, text.encode(errors="backslashreplace"))
        finally:  # also if the reader of stderr is gone
            os._exit(1)

    sys.excepthook = hook


def _marked(text: str) -> str:
    """Marks each line with the rank, if there are several."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return text
    return textwrap.indent(text, f"[rank {os.environ.get('RANK', '0')}] ")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
