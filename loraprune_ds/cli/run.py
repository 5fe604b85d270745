"""Prunes a decoder model while it fine-tunes. One YAML is one run.

deepspeed launch/run.py --config launch/configs/paper/llama-7b.yaml
deepspeed --quiet --num_accelerators 2 launch/run.py --config launch/configs/quickstart.yaml     (on a CPU)
loraprune-ds run --ranks 2 --config launch/configs/quickstart.yaml                               (the same)
"""

import argparse
import gc
import os
import sys
from typing import TYPE_CHECKING

from loraprune_ds import ranks
from loraprune_ds.arguments import Parser
from loraprune_ds.checkpoint.layout import REPORT_FILE, read_status
from loraprune_ds.config_file import config_value, read_config
from loraprune_ds.errors import ShortfallError, UserError, leave, leave_on_error, tell
from loraprune_ds.files import read_json
from loraprune_ds.train.after import measure_after
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.stop import find_launchers

STOPPED_EXIT_CODE = 85  # stopped on request, and saved
INTERRUPTED_EXIT_CODE = 130  # interrupted twice: stopped immediately

if TYPE_CHECKING:
    from loraprune_ds.zero.comm import Communicator


def parse_arguments(*more: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, with options from `more` parsers."""
    parser = Parser(__doc__, more)
    parser.add_argument("--config", required=True, help="YAML file of the run, or a shipped launch/configs/*.yaml")
    value = "override a value, e.g. --set prune.ratio=0.3; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=value)
    where = "go on from the newest undamaged checkpoint of output_dir, or of a run or step folder"
    parser.add_argument("--resume", metavar="auto|PATH", help=where)
    shown = "print this value of the config, for example output_dir, and exit"
    parser.add_argument("--show", metavar="KEY", help=shown)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0 finished, 1 failed, 2 bad input, 3 finished below its ratio, 85 stopped, 130 killed."""
    ranks.adopt_srun_ranks()
    launchers = find_launchers()
    joined = False
    try:
        arguments = parse_arguments()
        output = OutputFolder(read_config(arguments.config, arguments.set), arguments.resume)
        if arguments.show is not None:
            print(config_value(output.config, arguments.show))
            return 0
        if output.start != "finished":
            if output.config.train.deterministic:
                os.environ |= ranks.DETERMINISTIC
            comm = join_ranks()
            joined = True
            if not prune(output, comm, launchers):
                return STOPPED_EXIT_CODE
        if os.environ.get("RANK", "0") == "0":
            from loraprune_ds.report.summary import summary_table

            if output.start == "finished":
                print(f"{output.path} holds this run, finished:")
            try:
                measure_after(output.config, output.path, lambda line: print(line, flush=True))
            finally:
                print(summary_table(read_json(output.path / REPORT_FILE), output.path), flush=True)
            if (status := read_status(output.path)) and status.error:
                raise ShortfallError(status.error)
    except UserError as error:
        tell(error, agreed=joined)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0


def launch() -> int:
    """Checks the arguments of `loraprune-ds run`, then becomes DeepSpeed's launcher, which runs `main` on all ranks."""
    own = Parser(None, add_help=False)
    own.add_argument("--ranks", type=int, metavar="N", help="processes on this machine (default: one per GPU)")
    try:
        chosen, arguments = own.parse_known_args()
        options = parse_arguments(own)
        launcher = ranks.launcher_command(__name__, chosen.ranks, os.environ)
        OutputFolder(read_config(options.config, options.set), options.resume)  # before launchers and ranks print
    except UserError as error:
        tell(error)
        return error.exit_code
    if options.show is not None:
        sys.argv[1:] = arguments
        return main()
    if chosen.ranks is not None:  # otherwise each rank on a CPU would use all cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // chosen.ranks)))
    os.execv(launcher[0], [*launcher, *arguments])


def join_ranks() -> "Communicator":
    """Starts the process group, after all imports. Collective."""
    ranks.check_ranks(os.environ)  # before DeepSpeed is imported, which takes seconds
    ranks.collective_timeout(os.environ)
    ranks.longest_silence(os.environ)
    ranks.silence_libraries()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks

        quiet_deepspeed()
        import loraprune_ds.train.run  # noqa: F401  # reports a missing package before other ranks wait
    except ImportError as error:  # or DeepSpeed lacks a private module
        raise UserError(
            f"{error}; install the versions that pyproject.toml names, as launch/quickstart.sh does"
        ) from None
    return start_ranks()


def prune(output: OutputFolder, comm: "Communicator", launchers: list[int]) -> bool:
    """Runs on all ranks. Returns False after a request to stop. Collective."""
    from loraprune_ds.train.run import run
    from loraprune_ds.train.watch import Watch
    from loraprune_ds.zero.device import empty_cache
    from loraprune_ds.zero.engine import stop_ranks

    gc.freeze()  # DeepSpeed collects garbage over all objects twice per cut, and imports left none
    watch = Watch(comm, ranks.longest_silence(os.environ), launchers)
    try:
        finished = run(output, comm)
    finally:
        watch.close()
    stop_ranks()  # not after an error, because NCCL would wait for ranks that wait for this one
    gc.collect()
    empty_cache()  # the process of `evaluate.after` needs the memory
    return finished


if __name__ == "__main__":
    leave_on_error()
    leave(main())
