"""Compares results in one table, and in one picture of quality over the removed fraction.

%(prog)s runs/lora runs/magnitude pruned.json --picture comparison.png

RUN is the folder of a finished run, or the output of launch/evaluate.py --json. The latter has a removed fraction if it
was measured with --dense, or on a run.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from loraprune_ds.arguments import Parser
from loraprune_ds.errors import require
from loraprune_ds.exits import run_command

PICTURES = (".png", ".pdf", ".svg")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("results", metavar="RUN", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw a picture too (.png, .pdf or .svg)")
    return parser.parse_args()


def main() -> int:
    return run_command(lambda: compare(parse_arguments()))


def compare(arguments: argparse.Namespace) -> None:
    from loraprune_ds.evaluate.compare import comparison_table, draw_comparison, read_results

    picture, known = arguments.picture, ", ".join(PICTURES)
    require(not picture or picture.suffix in PICTURES, f"--picture {picture}: its name must end in {known}")
    models = read_results(arguments.results)
    if picture:
        draw_comparison(picture, models)
        print(f"picture: {picture}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"results": [asdict(model) for model in models]}, indent=2, allow_nan=False))
    else:
        print(comparison_table(models), end="")
