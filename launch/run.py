"""Prunes a LLaMA-family model while it fine-tunes: one YAML, one run.

deepspeed launch/run.py --config launch/configs/llama-7b.yaml
deepspeed --quiet --num_accelerators 2 launch/run.py --config launch/configs/quickstart.yaml     (on a CPU)
"""

import argparse
import gc
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

try:
    from loraprune_ds.config import RunConfig
    from loraprune_ds.config_file import load_config
    from loraprune_ds.errors import UserError
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes")

STOPPED_EXIT_CODE = 85  # asked to stop and saved; Slurm scripts requeue on it
INTERRUPTED_EXIT_CODE = 130  # interrupted twice: stopped at once
GRACE = 5.0  # seconds that the other ranks stay after an error


if TYPE_CHECKING:
    from loraprune_ds.train.output import Start


class Parser(argparse.ArgumentParser):
    """Wrong arguments are told like any other wrong input: by one rank, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value, e.g. --set prune.ratio=0.3"
    )
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest good checkpoint of output_dir, or of a run or step folder",
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0 finished, 1 the run went wrong, 2 unusable input, 85 stopped on request."""
    rank = int(os.environ.get("RANK", "0"))
    joined = False
    try:
        arguments = parse_arguments()
        config = load_config(arguments.config, arguments.set)
        config = replace(config, output_dir=os.path.expanduser(config.output_dir))
        # Heavy imports come after the config is known to be good: a typo should not cost ten seconds.
        from loraprune_ds.train.output import inspect_output

        start = inspect_output(config, arguments.resume)
        joined = start.kind != "finished"
        if joined and not prune(config, start):
            return STOPPED_EXIT_CODE
        if rank == 0:
            if start.kind == "finished":
                print(f"{config.output_dir} holds this run, finished:")
            print_summary(Path(config.output_dir))
    except UserError as error:
        tell(error, rank, agreed=joined)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0


def tell(error: UserError, rank: int, *, agreed: bool) -> None:
    """One line from rank 0 about what all ranks met.

    The first rank that leaves makes the launcher end the others, so those wait until rank 0 has spoken. A rank still
    alive after that met an error of its own, unless the ranks had `agreed` on it, and tells it.
    """
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE)
    if not agreed:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)


def prune(config: RunConfig, start: "Start") -> bool:
    """Carries out the run on all ranks; False if it was asked to stop. Collective."""
    if not config.logging.verbose:
        silence_libraries()
    from torch.distributed import DistError

    from loraprune_ds.train.run import run
    from loraprune_ds.train.watch import Watch
    from loraprune_ds.zero.engine import start_ranks, stop_ranks

    try:
        comm = start_ranks()
    except DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "if another run uses that port, give the launcher a --master_port"
        raise UserError(f"the ranks cannot meet at {where} ({hint}): {str(error).splitlines()[0]}") from None
    gc.freeze()  # what the imports have made is no garbage: DeepSpeed collects twice per cut, over all of it
    watch = Watch(comm)
    try:
        return run(config, comm, start)
    finally:
        watch.close()
        stop_ranks()


def silence_libraries() -> None:
    """Leaves only what the run itself has to say."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # every rank would tell of every retry
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from loraprune_ds.zero.engine import quiet_deepspeed

    quiet_deepspeed()


def print_summary(folder: Path) -> None:
    from loraprune_ds.train.report import read_report
    from loraprune_ds.train.summary import summary_table

    print(summary_table(read_report(folder), folder))


def leave(code: int) -> NoReturn:
    """Ends this process without taking the interpreter down, which now and then aborts in a thread of gloo's (-6)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
