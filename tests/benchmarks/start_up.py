"""Measures what the tokens of a run cost at its first start and at the next ones.

    python -m tests.benchmarks.start_up [--rows 10000 40000] [--rounds 3] [--reference CHECKOUT]

Rows of instructions and of chats, about as long as LaMini's, are made of Python's help topics and tokenised for
SmolLM2. The first start makes the tokens. The second one, in a process of its own, finds and maps them. `datasets` does
the same with `load_dataset` and `map`. There its import counts, as only it needs that. `--reference` adds an earlier
checkout. Other work on the machine makes even CPU seconds longer. So all take turns in every round, and the round with
the fewest CPU seconds counts. The result goes to tests/benchmarks/results/start_up.json.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraprune_ds.config_data import DataConfig
from loraprune_ds.files import write_json
from loraprune_ds.model.embedded import embedded_model_dir, embedded_text

ROOT = Path(__file__).resolve().parents[2]
RESULT = Path(__file__).parent / "results" / "start_up.json"
WORDS = (18, 60)  # of a request and its answer
FORMS = ("instruction", "chat")


def write_rows(path: Path, form: str, rows: int) -> Path:
    """Writes so many rows as JSONL."""
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


def load(way: str, path: str, form: str) -> None:
    """Loads the samples as a rank does, and prints what it took."""
    from loraprune_ds.model.tokenizer import load_tokenizer
    from loraprune_ds.train.data import loading

    fields: dict[str, Any] = {"input_field": None} if form == "instruction" else {}
    config = DataConfig(path=path, format=form, window=512, **fields)  # pyright: ignore[reportArgumentType]
    tokenizer = load_tokenizer(embedded_model_dir())
    began = time.perf_counter(), time.process_time()
    if way == "datasets":
        samples = load_by_datasets(config, tokenizer)
    else:
        samples = loading.load_samples(config, tokenizer, minimum=1, vocab_size=len(tokenizer)).samples
    seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "samples": len(samples)}))


def load_by_datasets(config: DataConfig, tokenizer: Any) -> Any:
    """Makes the columns of the same samples by `datasets`, nine rows of ten."""
    from datasets import Dataset, Features, List, Value, disable_progress_bars, load_dataset

    from loraprune_ds.train.data import chat, loading, tokens

    disable_progress_bars()
    (source,) = config.sources
    rows = load_dataset("json", data_files=str(config.path), split="train")
    assert isinstance(rows, Dataset)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        if config.format == "chat":
            tokenized = chat.tokenize_chats(map(chat.read_chat, examples), tokenizer)
        else:
            instructions = (loading._instruction_of(row, source) for row in examples)
            tokenized = tokens.tokenize_instructions(instructions, tokenizer)
        pairs = [(ids[: config.window], labels[: config.window]) for ids, labels in tokenized]
        return {name: [pair[i] for pair in pairs] for i, name in enumerate(("input_ids", "labels"))}

    tuning = rows.select([i for i in range(len(rows)) if i % 10 != 4])
    tuning = tuning.map(
        tokenise,
        batched=True,
        remove_columns=tuning.column_names,
        features=Features({name: List(Value("int32")) for name in ("input_ids", "labels")}),
        new_fingerprint=f"start_up_{config.format}_{len(rows)}",
    )
    columns = tuning.with_format("arrow")[:]
    return columns["input_ids"].combine_chunks()


def start(way: str, root: Path, path: Path, form: str, cache: Path) -> dict[str, Any]:
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--load", way, str(path), form]
    environment |= {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def start_twice(form: str, rows: int, way: str, root: Path) -> dict[str, Any]:
    with TemporaryDirectory() as scratch:
        path = write_rows(Path(scratch, "rows.jsonl"), form, rows)
        first, second = (start(way, root, path, form, Path(scratch, "cache")) for _ in range(2))
    print(turn := {"format": form, "rows": rows, "way": way, "first": first, "second": second}, flush=True)
    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 40_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(*arguments.load)
        return
    from loraprune_ds.report.provenance import hardware, versions

    ways = {"reference": arguments.reference, "here": ROOT, "datasets": ROOT}
    found = [(way, root) for way, root in ways.items() if root is not None]
    kinds = [(form, rows, *way) for form, rows, way in product(FORMS, arguments.rows, found)]
    turns = [start_twice(*kind) for kind in kinds * arguments.rounds]
    best = [min(turns[i :: len(kinds)], key=lambda turn: turn["first"]["cpu_seconds"]) for i in range(len(kinds))]
    facts = {"rounds": arguments.rounds, "versions": versions(), "hardware": hardware("cpu")}
    write_json(RESULT, {"rows": best} | facts)


if __name__ == "__main__":
    main()
