"""Converts the result of a run to the format of another tool.

%(prog)s runs/quickstart --format gguf-q8_0
%(prog)s runs/quickstart --push-to-hub OWNER/NAME --results evaluation.json        (private, unless --public)
%(prog)s runs/quickstart/checkpoints/step-20 --format adapter     (of a running or stopped run)

hf         Hugging Face model, LoRA merged
adapter    the pruned base and its PEFT adapter, for further tuning
gguf-f16   llama.cpp, 16 bit
gguf-q8_0  llama.cpp, 8 bit
"""

import argparse
from pathlib import Path

from loraprune_ds.arguments import Parser, require_option
from loraprune_ds.errors import run_command
from loraprune_ds.ranks.job import silence_libraries


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "source", type=Path, help="folder of a run, of one of its checkpoints, or of a merged model"
    )
    about = "a Hugging Face model (the default), separate base and LoRA, or a file for llama.cpp"
    parser.add_argument(
        "--format", default="hf", choices=("hf", "adapter", "gguf-f16", "gguf-q8_0"), help=about
    )
    parser.add_argument(
        "--out", type=Path, help="new folder for the result (default: ./NAME-FORMAT)"
    )
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="upload the result, to a private repository"
    )
    parser.add_argument(
        "--public", action="store_true", help="make that repository public, if it is new"
    )
    about = "outputs of launch/evaluate.py --json, for the card on the hub"
    parser.add_argument("--results", nargs="+", default=[], type=Path, metavar="JSON", help=about)
    return parser.parse_args()


def main() -> int:
    return run_command(lambda: convert(parse_arguments()))


def convert(arguments: argparse.Namespace) -> None:
    """Writes the export. Prints notes and one line about the result."""
    source: Path = arguments.source
    out: Path = arguments.out or Path(f"{source.resolve().name}-{arguments.format}")
    require_option(arguments, "push_to_hub", "public", "results")
    silence_libraries()
    # These imports take seconds.
    from loraprune_ds.export.contents import find_contents
    from loraprune_ds.export.formats import export
    from loraprune_ds.export.model_card import check_push, push

    repo: str | None = arguments.push_to_hub
    if repo is not None:
        check_push(repo, arguments.results)
    contents = find_contents(source)
    for remark in export(contents, arguments.format, out):
        print(f"note: {remark}")
    print(f"{arguments.format}: {out}")
    if repo is not None:
        print(f"hub: {push(out, repo, source, arguments.results, private=not arguments.public)}")
