"""Tunes SmolLM2-135M on text, on chats that it wrote itself, and on both. Measures what its answers are like.

    python -m tests.benchmarks.chats --wikitext valid.txt --test test.raw [--work FOLDER] [--arms NAME ...] [--seeds 0]
    python -m tests.benchmarks.chats --test test.raw --runs runs/quickstart      (finished runs, and the dense model)

Arms have equal steps and windows, 30 % of the linears removed, and the settings of base.yaml otherwise. Answers are
greedy, of at most 128 tokens: to the shipped prompts, which choose the best arm, and to other_prompts.jsonl.
Results: results/chats.json, a row per arm and seed. An interrupted command goes on where it was.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from loraprune_ds.evaluate.result import mean_metric
from loraprune_ds.files import read_json, write_text
from loraprune_ds.model.sources import embedded_text
from tests.benchmarks.running import RESULTS, ROOT, add_to, cpu_environment, make_parser, run_base

RESULT = RESULTS / "chats.json"
PROMPTS = {"shipped": "default", "other": "tests/benchmarks/other_prompts.jsonl"}
WINDOWS = ("--window", "128", "--max-windows", "160")
STEPS = 80  # of 4 windows of 256 tokens
CHATS, TOPICS = {"path": "embedded-chats", "format": "chat"}, {"path": "embedded", "format": "text"}


def mixed(share: float) -> list[dict[str, Any]]:
    return [CHATS | {"weight": share}, TOPICS | {"weight": round(1 - share, 2)}]


def arms(wikitext: Path) -> dict[str, list[str]]:
    """Returns the settings of each arm."""
    chats = ["data.path=embedded-chats", "data.format=chat", "data.packing=true"]
    return {
        "wikitext": [f"data.path={wikitext.resolve()}"],
        "topics": ["data.path=embedded"],
        "chats": chats,
        "chats-topics-70": [f"data.path={json.dumps(mixed(0.7))}", "data.packing=true"],
        "chats-topics-50": [f"data.path={json.dumps(mixed(0.5))}", "data.packing=true"],
        "chats-distilled-50": [*chats, "train.distill_weight=0.5"],
        "chats-distilled-100": [*chats, "train.distill_weight=1"],
        "chats-topics-70-at-41.7": [f"data.path={json.dumps(mixed(0.7))}", "data.packing=true", "prune.ratio=0.417"],
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--wikitext", type=Path, help="text to tune on")
    parser.add_argument("--test", type=Path, required=True, help="text of the same kind to measure on")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "chats", help="default: runs/chats")
    parser.add_argument("--arms", nargs="+", help="default: all, and the dense model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="measure these instead")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = {"wikitext_test": arguments.test, "topics": arguments.work / "topics.txt"}
    write_text(texts["topics"], "\n\n".join(embedded_text()))
    add("dense", "embedded", texts)
    for folder in arguments.runs:
        add(folder.name, str(folder), texts)
    settings = {} if arguments.runs else arms(arguments.wikitext)
    for seed in arguments.seeds:
        for name in arguments.arms or settings:
            folder = arguments.work / f"{name}-s{seed}"
            train(folder, settings[name], seed, arguments.ranks)
            add(f"{name}, seed {seed}", str(folder), texts)


def add(key: str, model: str, texts: dict[str, Path]) -> None:
    """Measures a model, unless the file has its result."""
    if not RESULT.exists() or key not in read_json(RESULT):
        add_to(RESULT, key, measured(model, texts))
        print(f"{key} is measured", file=sys.stderr, flush=True)


def train(folder: Path, settings: list[str], seed: int, ranks: int) -> None:
    common = {
        "output_dir": folder,
        "seed": seed,
        "data.window": 256,
        "train.learning_rate": 4e-3,
        "train.steps": STEPS,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4 // ranks,
        "checkpoint.every": 20,
        "checkpoint.keep_last": 1,
        "logging.report_to": "[]",
    }
    run_base(ranks, [*(f"{key}={value}" for key, value in common.items()), *settings], "--resume", "auto")


def measured(model: str, texts: dict[str, Path]) -> dict[str, Any]:
    answers = {name: written(model, prompts) for name, prompts in PROMPTS.items()}
    perplexity = {name: evaluated(model, "--text", str(path), *WINDOWS)["perplexity"] for name, path in texts.items()}
    tasks = mean_metric(evaluated(model, "--tasks", "reasoning_gym")["tasks"], "exact_match")
    row = {"answers": answers, "perplexity": perplexity, "exact_match": tasks}
    if model == "embedded":
        return row
    report = read_json(Path(model) / "report.json")
    removed = 1 - report["params"]["linear_pruned"] / report["params"]["linear_dense"]
    settings = {key: report["config"][key] for key in ("data", "prune", "train")}
    return row | {"removed_linear_fraction": removed, "held_out": report["perplexity"], **settings}


def written(model: str, prompts: str) -> dict[str, Any]:
    """Returns the means over greedy answers, their median length, and the texts."""
    dense = [] if model == "embedded" else ["--dense", "embedded"]
    greedy = evaluated(model, *dense, "--answers", prompts)["answers"]["greedy"]
    texts = greedy["texts"]
    means = {key: greedy[key] for key in ("ended", "repetition", "empty", "tokens", "dense_perplexity", "by_kind")}
    means["median_tokens"] = statistics.median(answer["tokens"] for answer in texts)
    return means | {"texts": [answer["text"] for answer in texts]}


def evaluated(model: str, *options: str) -> dict[str, Any]:
    command = [sys.executable, "launch/evaluate.py", model, *options, "--json"]
    answer = subprocess.run(command, cwd=ROOT, check=True, env=cpu_environment(), stdout=subprocess.PIPE, text=True)
    return json.loads(answer.stdout)


if __name__ == "__main__":
    main()
