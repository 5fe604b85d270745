"""Prints answers of the dense and the pruned model of launch/quickstart.sh, and measures of all 50.

python launch/quickstart_answers.py runs/quickstart
"""

import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from loraprune_ds.errors import run_command
from loraprune_ds.evaluate.result import answers_table
from loraprune_ds.evaluate.settings import EvaluationSettings
from loraprune_ds.generate.prompts import DEFAULT_PROMPTS, AnswerSettings, read_prompts
from loraprune_ds.ranks.job import silence_libraries

if TYPE_CHECKING:
    from loraprune_ds.evaluate.answers import Answers

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


def shown_lines(settings: AnswerSettings, dense: "Answers", pruned: "Answers") -> Iterator[str]:
    """Yields the first prompt of each kind with its answers, then a table of all answers."""
    yield side_by_side("dense", "pruned")
    kinds = [prompt.kind for prompt in settings.prompts]
    for kind in dict.fromkeys(kinds):
        first = kinds.index(kind)
        question = " ".join(settings.prompts[first].messages[-1]["content"].split())
        yield "\n" + textwrap.indent(textwrap.fill(f"{kind}: {question}", 2 * WIDTH), "> ")
        texts: list[str] = []
        for answer in (dense.texts[first], pruned.texts[first]):
            end = " ..." if answer.tokens == settings.max_new_tokens else ""
            texts.append(answer.text.strip() + end)
        yield side_by_side(*texts)
    yield ""
    yield from answers_table(f"all {len(kinds)} prompts", [asdict(dense), asdict(pruned)])


def main() -> None:
    silence_libraries()
    # These take seconds to import, which `shown_lines` does not need.
    import torch

    from loraprune_ds import open_result
    from loraprune_ds.evaluate.answers import write_greedily
    from loraprune_ds.evaluate.evaluation import prepare_models
    from loraprune_ds.pretrained.sources import EMBEDDED
    from loraprune_ds.ranks.device import current_device, fast_half_products

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    folder = sys.argv[1]
    result: Any = open_result(folder)
    config = result.report["config"]["model"]
    if not result.load_tokenizer().chat_template:
        return
    settings = read_prompts(DEFAULT_PROMPTS)
    count = len(settings.prompts)
    print(f"\nBoth models answer {count} prompts: about a minute on two cores\n", flush=True)
    asked = EvaluationSettings(dtype=config["dtype"], answers=settings)
    with fast_half_products(config["dtype"]):
        models = prepare_models([config["path"], folder], asked)
        answers = [write_greedily(model.load(current_device()), settings) for model in models]
    print("\n".join(shown_lines(settings, *answers)))
    if config["path"] == EMBEDDED:
        print(f"\n{ADVICE}")
    print(
        f"\nAll answers: python launch/evaluate.py {folder} --dense {config['path']} --answers --page answers.html"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
