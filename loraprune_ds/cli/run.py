"""Prunes a decoder model while it fine-tunes. One YAML is one run.

deepspeed launch/run.py --config launch/configs/paper/llama-7b.yaml
deepspeed --quiet --num_accelerators 2 launch/run.py --config launch/configs/quickstart.yaml     (on a CPU)
loraprune-ds run --ranks 2 --config launch/configs/quickstart.yaml                               (the same)
"""

import argparse
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from loraprune_ds.arguments import Parser, at_least
from loraprune_ds.checkpoint import layout
from loraprune_ds.cli.after import check_after, check_prompts, measure_after
from loraprune_ds.config_file import config_value, read_config
from loraprune_ds.config_types import read_amount
from loraprune_ds.errors import ShortfallError, UserError, leave, leave_on_error, require, tell
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.ranks import job
from loraprune_ds.report import records
from loraprune_ds.report.measured import read_measured, table
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.stop import find_launchers
from loraprune_ds.units import format_percent
from loraprune_ds.versions import check_new

if TYPE_CHECKING:
    from loraprune_ds.ranks.comm import Communicator

STOPPED_EXIT_CODE = 85  # stopped on request, and saved
INTERRUPTED_EXIT_CODE = 130  # interrupted twice: stopped immediately
RESULT_FILES = (
    (records.MODEL_FOLDER, "the smaller Hugging Face model, LoRA merged"),
    (records.REPORT_FILE, "these numbers and more, with versions and config"),
    (records.KEPT_GROUPS_FILE, "the groups that every layer kept"),
    (records.KEPT_GROUPS_PICTURE, "the same as a picture"),
    (records.TRAINING_PICTURE, "loss, sparsity, speed and memory over the steps"),
    (records.METRICS_FILE, "every step, cut and evaluation"),
    (records.ANSWERS_PAGE, "answers of both models, side by side"),
    (records.EVALUATION_FILE, "answers and tasks as data"),
    (records.TENSORBOARD_FOLDER, "the same as curves, for tensorboard --logdir"),
)
# The first four decide whether to take the model.
SHOWN = (
    "parameters",
    "perplexity",
    "answers that end",
    "tokens per second",
    "accuracy",
    "exact match",
    "repetition",
    "agreement",
    "linear parameters",
)
MOST_ROWS = 8


def parse_arguments(*more: argparse.ArgumentParser) -> argparse.Namespace:
    """Reads the command line, with options from `more` parsers."""
    parser = Parser(__doc__, parents=more)
    parser.add_argument(
        "--config", required=True, help="YAML file of the run, or a shipped launch/configs/*.yaml"
    )
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
    job.adopt_srun_ranks()
    launchers = find_launchers()
    joined = False
    try:
        arguments = parse_arguments()
        output = OutputFolder(read_config(arguments.config, arguments.set), arguments.resume)
        if arguments.show is not None:
            print(config_value(output.config, arguments.show))
            return 0
        if output.start != "finished":
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            if output.config.train.deterministic:
                os.environ |= job.DETERMINISTIC
            comm = join_ranks(sharded=output.config.deepspeed is not None)
            joined = True
            if not prune(output, comm, launchers):
                return STOPPED_EXIT_CODE
        if os.environ.get("RANK", "0") == "0":
            show_result(output)
    except UserError as error:
        tell(error, agreed=joined)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE
    return 0


def show_result(output: OutputFolder) -> None:
    """Measures and prints the result of a finished run. On rank 0 only. Raises ShortfallError if it is too large."""
    if output.start == "finished":
        print(f"{output.path} holds this run, finished:")
    try:
        measure_after(output.config, output.path, lambda line: print(line, flush=True))
    finally:
        report = read_json(output.path / records.REPORT_FILE)
        print(summary_table(report, output.path), flush=True)
    status = layout.read_status(output.path)
    if status and status.error:
        raise ShortfallError(status.error)


def launch() -> int:
    """Checks the arguments, or raises UserError, and runs `main`, on all ranks unless `deepspeed` is null."""
    parser = Parser(None, add_help=False)
    parser.add_argument(
        "--ranks",
        type=at_least(1),
        metavar="N",
        help="processes on this machine (default: one per GPU)",
    )
    _, arguments = parser.parse_known_args()  # those of each rank
    options = parse_arguments(parser)
    ranks: int | None = options.ranks
    launcher = job.launcher_command(__name__, ranks, os.environ)
    # before ranks print
    config = OutputFolder(read_config(options.config, options.set), options.resume).config
    alone = config.deepspeed is None
    require(not alone or ranks in (None, 1), f"--ranks {ranks}: deepspeed: null has one rank")
    if options.show is not None or alone:
        sys.argv[1:] = arguments
        return main()
    check_new("deepspeed")
    if ranks is not None:  # otherwise each rank on a CPU would use all cores
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.execv(launcher[0], [*launcher, *arguments])


def join_ranks(*, sharded: bool, verbose: bool = False) -> "Communicator":
    """Starts the process group, if there is one, after all imports. Collective. `verbose`: libraries may print."""
    check_new("transformers", "peft")
    if sharded:
        check_new("deepspeed")
    job.check_ranks(os.environ)  # before DeepSpeed is imported, which takes seconds
    job.collective_timeout(os.environ)
    job.longest_silence(os.environ)
    if not verbose:
        job.silence_libraries()
    try:
        import loraprune_ds.train.run  # noqa: F401  # reports a missing package before other ranks wait
        from loraprune_ds.engines import run_engine
        from loraprune_ds.ranks.device import limit_kernels

        engine = run_engine(sharded=sharded)
    except ImportError as error:  # or DeepSpeed lacks a private module
        versions = "install the versions that pyproject.toml names, as launch/quickstart.sh does"
        raise UserError(f"{error}; {versions}") from None
    limit_kernels()
    return engine.start_ranks()


def prune(output: OutputFolder, comm: "Communicator", launchers: list[int]) -> bool:
    """Runs on all ranks. Returns False after a request to stop. Collective."""
    from loraprune_ds.ranks.comm import stop_ranks
    from loraprune_ds.ranks.device import empty_cache
    from loraprune_ds.train.run import run
    from loraprune_ds.train.watch import Watch

    gc.freeze()  # DeepSpeed collects garbage over all objects twice per cut, and imports left none
    watch = Watch(comm, job.longest_silence(os.environ), launchers)
    try:
        comm.on_rank_0(lambda: check_after(output.config))  # the rank that will measure
        finished = run(output, comm, check_prompts)
    finally:
        watch.close()
    stop_ranks()  # not after an error, because NCCL would wait for ranks that wait for this one
    gc.collect()
    empty_cache()  # the process of `evaluate.after` needs the memory
    return finished


def summary_table(report: JsonObject, folder: Path) -> str:
    """Makes the table of a report.json: what decides first, at most eight rows."""
    model = read_measured(report, folder / records.REPORT_FILE)
    cuts = _plural(len(report["prune_steps"]), "cut")
    ranks = "one process"
    if report["config"]["deepspeed"] is not None:
        ranks = _plural(report["world_size"], "ZeRO-3 rank")
    shown = [name for name in SHOWN if name in model.values][:MOST_ROWS]
    lines = [f"{report['steps']} steps, {cuts}, {ranks}", "", *table(model, shown), ""]
    if target := report["target"]:
        reached = read_amount(target["asked"], "target").format(target["reached"])
        lines.append(f"prune.target {target['asked']}: {reached} reached")
    else:
        asked = format_percent(report["asked_ratio"])
        lines.append(f"prune.ratio: {asked} of the linear parameters of the start were to leave")
    return "\n".join([*lines, *_result_lines(folder), ""])


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _result_lines(folder: Path) -> Iterable[str]:
    yield f"results in {folder}"
    for name, contents in RESULT_FILES:
        path = folder / name
        if path.is_dir():
            name += "/"
        if path.exists():
            yield f"  {name:<17} {contents}"


if __name__ == "__main__":
    leave_on_error()
    leave(main())
