"""Compares results in one table, and in one picture of quality over the removed fraction.

%(prog)s runs/lora runs/magnitude pruned.json --picture comparison.png

RUN is the folder of a finished run or of a callback's training, or the output of launch/evaluate.py --json. The latter
has a removed fraction if it was measured with --dense, or on a run.
"""

import argparse
import sys
from pathlib import Path

from loraprune_ds.arguments import Parser
from loraprune_ds.errors import UserError, require, run_command
from loraprune_ds.files import json_text
from loraprune_ds.report.comparison import draw_comparison
from loraprune_ds.report.measured import comparison, read_results

SUFFIXES = (".png", ".pdf", ".svg")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("results", metavar="RUN", nargs="+", type=Path)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw a picture too (.png, .pdf or .svg)"
    )
    return parser.parse_args()


def main() -> int:
    return run_command(lambda: compare(parse_arguments()))


def compare(arguments: argparse.Namespace) -> None:
    picture: Path | None = arguments.picture
    if picture and picture.suffix not in SUFFIXES:
        raise UserError(f"--picture {picture}: its name must end in {', '.join(SUFFIXES)}")
    models = read_results(arguments.results)
    if picture:
        try:
            drawn = draw_comparison(picture, models)
        except (OSError, ValueError) as error:
            raise UserError(f"--picture {picture} cannot be written: {error}") from None
        require(
            drawn,
            "nothing to draw: no result has a quality and a removed fraction; give launch/evaluate.py --dense",
        )
        print(f"picture: {picture}", file=sys.stderr)
    if arguments.json:
        print(json_text({"results": models}, indent=2), end="")
    else:
        print(comparison(models), end="")
