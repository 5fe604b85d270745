"""Prints answers of the dense and the pruned model of launch/quickstart.sh, and measures of all 50.

python launch/quickstart_answers.py runs/quickstart
"""

import sys
import textwrap
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from loraprune_ds.errors import run_command
from loraprune_ds.evaluate.result import answers_table
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.pretrained.sources import EMBEDDED
from loraprune_ds.report.records import ANSWERS_PAGE, EVALUATION_FILE, REPORT_FILE

WIDTH, ROWS = 48, 8  # of a column
# The figures stand in tests/benchmarks/README.md. Nobody has measured the answers of a longer run.
ADVICE = """Good for drafts of short replies at most: even uncut, so small a model solves 77 of 300 questions. Take a
larger one and more tokens: 409,600 instead of 81,920 lower WikiText-2's perplexity at 41.7 % from 47.2 to 41.9."""


def side_by_side(*texts: str) -> str:
    rows: list[str] = []
    for cells in zip_longest(*map(_wrapped, texts), fillvalue=""):
        row = "  ".join(f"{cell:<{WIDTH}}" for cell in cells)
        rows.append(row.rstrip())
    return "\n".join(rows)


def _wrapped(text: str) -> list[str]:
    lines: list[str] = []
    for line in text.splitlines():
        lines += textwrap.wrap(line, WIDTH) or [""]
    return lines if len(lines) <= ROWS else [*lines[: ROWS - 1], "..."]


def shown_lines(result: JsonObject) -> Iterator[str]:
    """Yields the first prompt of each kind with its greedy answers, from an evaluation."""
    plan = result["answers_plan"]
    yield side_by_side("dense", "pruned")
    kinds = [prompt["kind"] for prompt in plan["prompts"]]
    for kind in dict.fromkeys(kinds):
        first = kinds.index(kind)
        question = " ".join(plan["prompts"][first]["messages"][-1]["content"].split())
        yield "\n" + textwrap.indent(textwrap.fill(f"{kind}: {question}", 2 * WIDTH), "> ")
        texts: list[str] = []
        for model in (result["dense"], result):
            answer = model["answers"]["greedy"]["texts"][first]
            end = " ..." if answer["tokens"] == plan["max_new_tokens"] else ""
            texts.append(answer["text"].strip() + end)
        yield side_by_side(*texts)
    yield ""
    greedy = [model["answers"]["greedy"] for model in (result["dense"], result)]
    yield from answers_table(f"all {len(kinds)} prompts", greedy)


def main() -> None:
    folder = Path(sys.argv[1])
    result = read_json(folder / EVALUATION_FILE, missing_ok=True)
    if not result.get("answers"):  # --set evaluate.after=[]
        return
    print("\n".join(shown_lines(result)))
    if read_json(folder / REPORT_FILE)["config"]["model"]["path"] == EMBEDDED:
        print(f"\n{ADVICE}")
    print(f"\nAll answers: {folder / ANSWERS_PAGE}")


if __name__ == "__main__":
    sys.exit(run_command(main))
