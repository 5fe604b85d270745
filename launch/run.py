"""Prunes a LLaMA-family model while it fine-tunes: one YAML, one run.

deepspeed launch/run.py --config launch/configs/llama-7b.yaml
deepspeed --quiet --num_accelerators 2 launch/run.py --config launch/configs/quickstart.yaml     (on a CPU)
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import load_config
from loraprune_ds.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a value, e.g. --set prune.ratio=0.3"
    )
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0 finished, 1 the run went wrong, 2 unusable input."""
    arguments = parse_arguments()
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        config = load_config(arguments.config, arguments.set)
        prune(config, is_main)
    except UserError as error:
        if is_main:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if is_main:
        print_summary(Path(config.output_dir))
    return 0


def prune(config: RunConfig, is_main: bool) -> None:
    """Runs unless the output folder already holds this run, finished."""
    # Heavy imports come after the config is known to be good: a typo should not cost ten seconds.
    from loraprune_ds.train.output import check_output

    if check_output(config):
        if is_main:
            print(f"{config.output_dir} holds this run, finished:")
        return
    if not config.logging.verbose:
        silence_libraries()
    from loraprune_ds.train.run import run
    from loraprune_ds.zero.engine import start_ranks, stop_ranks

    comm = start_ranks()
    try:
        run(config, comm)
    finally:
        stop_ranks()


def silence_libraries() -> None:
    """Leaves only what the run itself has to say."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from loraprune_ds.zero.engine import quiet_deepspeed

    quiet_deepspeed()


def print_summary(folder: Path) -> None:
    from loraprune_ds.train.report import read_report
    from loraprune_ds.train.summary import summary_table

    print(summary_table(read_report(folder), folder))


if __name__ == "__main__":
    sys.exit(main())
