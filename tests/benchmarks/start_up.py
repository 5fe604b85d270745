"""Measures what the tokens of a run cost at its first start and at the next ones.

    python -m tests.benchmarks.start_up [--rows 10000 40000] [--rounds 3]

Rows of instructions and of chats, about as long as LaMini's, are made of Python's help topics and tokenised for
SmolLM2. The first start makes the tokens. The second one, in another process, finds and maps them. Other work on
the machine makes even CPU seconds longer. All take turns in every round, and the round with the fewest CPU seconds
counts. The result goes to tests/benchmarks/results/start_up.json.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraprune_ds.config_data import DataConfig
from loraprune_ds.model.embedded import embedded_model_dir, embedded_text
from tests.benchmarks.running import ROOT, cpu_environment, make_parser, record

WORDS = (18, 60)  # of a request and its answer
FORMS = ("instruction", "chat")


def write_rows(path: Path, form: str, rows: int) -> Path:
    """Writes rows as JSONL."""
    words, draw = " ".join(embedded_text()).split(), random.Random(0)

    def piece(length: int) -> str:
        begin = draw.randrange(len(words) - length)
        return " ".join(words[begin : begin + length])

    with path.open("w") as file:
        for _ in range(rows):
            request, answer = (piece(length) for length in WORDS)
            row: dict[str, Any] = {"instruction": request, "response": answer}
            if form == "chat":
                row = {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}
            file.write(json.dumps(row) + "\n")
    return path


def load(path: str, form: str) -> None:
    """Loads the samples as a rank does, and prints the seconds."""
    from loraprune_ds.model.tokenizer import load_tokenizer
    from loraprune_ds.train.data import loading

    fields: dict[str, Any] = {"input_field": None} if form == "instruction" else {}
    config = DataConfig(path=path, format=form, window=512, **fields)  # pyright: ignore[reportArgumentType]
    tokenizer = load_tokenizer(embedded_model_dir())
    began = time.perf_counter(), time.process_time()
    samples = loading.load_samples(config, tokenizer, minimum=1, vocab_size=len(tokenizer)).samples
    seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "samples": len(samples)}))


def start(path: Path, form: str, cache: Path) -> dict[str, Any]:
    environment = cpu_environment(HF_DATASETS_CACHE=str(cache), TOKENIZERS_PARALLELISM="false")
    command = [sys.executable, __file__, "--load", str(path), form]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start_twice(form: str, rows: int) -> dict[str, Any]:
    with TemporaryDirectory() as scratch:
        path = write_rows(Path(scratch, "rows.jsonl"), form, rows)
        first, second = (start(path, form, Path(scratch, "cache")) for _ in range(2))
    return {"format": form, "rows": rows, "way": "here", "first": first, "second": second}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(*arguments.load)
        return
    kinds = list(product(FORMS, arguments.rows))
    turns = [start_twice(*kind) for kind in kinds * arguments.rounds]
    best = [min(turns[i :: len(kinds)], key=lambda turn: turn["first"]["cpu_seconds"]) for i in range(len(kinds))]
    record("start_up", {"rows": best, "rounds": arguments.rounds})


if __name__ == "__main__":
    main()
