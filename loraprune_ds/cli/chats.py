"""Lets a model write the chats that its pruned copy is tuned on.

%(prog)s MODEL --out chats.jsonl --tokens 1000000
%(prog)s MODEL --out chats.jsonl --prompts prompts.jsonl
deepspeed --quiet launch/chats.py MODEL --out chats.jsonl --tokens 1000000      (all GPUs, each with its share)

MODEL is named as for launch/evaluate.py. Without --prompts it writes the user's messages, too. A row of prompts.jsonl
is {"prompt": "2 + 3?"}, or has a list of messages. The model needs a chat template.
chats.draws.jsonl has every draw, so a stopped command goes on. chats.settings.json counts why draws were refused.
"""

import argparse
import os
from pathlib import Path

from loraprune_ds.arguments import Parser, at_least
from loraprune_ds.cli.run import join_ranks
from loraprune_ds.errors import leave, leave_on_error, require, run_command
from loraprune_ds.generate.prompts import read_prompts
from loraprune_ds.ranks import job


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--tokens", type=at_least(1), metavar="N", help="write until the kept rows have as many"
    )
    amount.add_argument("--prompts", metavar="PROMPTS.jsonl", help="answer these")
    parser.add_argument(
        "--max-new-tokens",
        type=at_least(1),
        default=512,
        metavar="N",
        help="per answer (default: 512)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-size", type=at_least(1), default=64, metavar="N", help="of texts (default: 64)"
    )
    parser.add_argument(
        "--engine", choices=("vllm", "transformers"), help="default: vllm if it is installed"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
    options = parser.parse_args()
    out = options.out
    folder = out.absolute().parent
    require(out.suffix == ".jsonl", f"--out {out}: give it the name of a .jsonl file")
    require(os.access(folder, os.W_OK), f"--out {out}: {folder} is not a writable folder")
    if options.prompts:
        options.prompts = read_prompts(
            options.prompts, "--prompts", max_new_tokens=options.max_new_tokens
        )
    return options


def main() -> int:
    """Returns the exit code: 0, 1 if a result cannot be written, or 2 for unusable input."""
    job.adopt_srun_ranks()
    return run_command(lambda: write(parse_arguments()))


def write(options: argparse.Namespace) -> None:
    """Writes the chats and prints what they are like. Collective."""
    comm = join_ranks(sharded=job.several_ranks(os.environ))
    # These imports take seconds.
    from loraprune_ds.chats.collect import collect
    from loraprune_ds.generate.models import find_model
    from loraprune_ds.ranks.comm import stop_ranks

    comm.first_per_node(lambda: find_model(options.model))
    selection = collect(options, comm)
    stop_ranks()
    if comm.rank == 0:
        print("\n".join(selection.summary()))


if __name__ == "__main__":
    leave_on_error()
    leave(main())
