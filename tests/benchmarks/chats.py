"""Tunes SmolLM2-135M on text, on chats that it wrote itself, and on both. Measures what its answers are like.

    python -m tests.benchmarks.chats --wikitext valid.txt --test test.raw [--work FOLDER] [--arms NAME ...] [--seeds 0]
        [--unread FILE ...]       (what embedded_chats.settings.json says the command drew, before it was read)
    python -m tests.benchmarks.chats --test test.raw --runs runs/quickstart      (finished runs, and the dense model)

Arms have equal steps and windows, 30 % of the linears removed, and the settings of base.yaml otherwise. Answers are
greedy, of at most 128 tokens: to the shipped prompts, which choose the best arm, and to other_prompts.jsonl.
Results: results/chats.json, a row per arm and seed. An interrupted command goes on where it was.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from loraprune_ds.config_sources import CHATS_FILE
from loraprune_ds.files import read_json, write_text
from loraprune_ds.generate.prompts import read_prompts
from loraprune_ds.pretrained.sources import embedded_model_dir, embedded_text
from loraprune_ds.pretrained.tokenizer import load_tokenizer
from tests.benchmarks.running import RESULTS, ROOT, add_to, evaluated, make_parser, run_base

RESULT = RESULTS / "chats.json"
PROMPTS = {"shipped": "default", "other": "tests/benchmarks/other_prompts.jsonl"}
WINDOWS = ("--window", "128", "--max-windows", "160")
STEPS = 80  # of 4 windows of 256 tokens
TRIMMED = 96  # tokens of an answer


def mixed(share: float, chats: list[Path | str], text: Path | str = "embedded") -> list[str]:
    sources = [
        {"path": str(path), "format": "chat", "weight": share / len(chats)} for path in chats
    ]
    sources.append({"path": str(text), "format": "text", "weight": round(1 - share, 2)})
    return [f"data.path={json.dumps(sources)}", "data.packing=true"]


def arms(wikitext: Path, trimmed: Path, unread: list[Path]) -> dict[str, list[str]]:
    """Returns the settings of each arm."""
    ours: list[Path | str] = ["embedded-chats"]
    chats = ["data.path=embedded-chats", "data.format=chat", "data.packing=true"]
    return {
        "wikitext": [f"data.path={wikitext.resolve()}"],
        "topics": ["data.path=embedded"],
        "chats": chats,
        "chats-topics-70": mixed(0.7, ours),
        "chats-topics-50": mixed(0.5, ours),
        "chats-wikitext-70": mixed(0.7, ours, wikitext),
        "chats-trimmed": [f"data.path={trimmed}", *chats[1:]],
        "unread-topics-70": mixed(0.7, [*unread]),
        "unread-wikitext-70": mixed(0.7, [*unread], wikitext),
        "chats-distilled-50": [*chats, "train.distill_weight=0.5"],
        "chats-distilled-100": [*chats, "train.distill_weight=1"],
        "chats-topics-70-at-41.7": [*mixed(0.7, ours), "prune.ratio=0.417"],
        "unread-topics-70-at-41.7": [*mixed(0.7, [*unread]), "prune.ratio=0.417"],
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--wikitext", type=Path, help="text to tune on")
    parser.add_argument(
        "--test", type=Path, required=True, help="text of the same kind to measure on"
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "chats", help="default: runs/chats"
    )
    parser.add_argument(
        "--unread", nargs="+", type=Path, default=[], help="drawn chats for the arms of that name"
    )
    parser.add_argument("--arms", nargs="+", help="default: all, and the dense model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--runs", nargs="+", type=Path, default=[], help="measure these instead")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    texts = {"wikitext_test": arguments.test, "topics": arguments.work / "topics.txt"}
    write_text(texts["topics"], "\n\n".join(embedded_text()))
    add("dense", "embedded", texts)
    texts["chats"] = held_out_chats(arguments.work / "chats.txt")
    add("dense", "embedded", texts)
    for folder in arguments.runs:
        add(folder.name, str(folder), texts)
    settings = dict[str, list[str]]()
    if not arguments.runs:
        settings = arms(
            arguments.wikitext, trimmed_chats(arguments.work / "trimmed.jsonl"), arguments.unread
        )
    for seed in arguments.seeds:
        for name in arguments.arms or settings:
            folder = arguments.work / f"{name}-s{seed}"
            train(folder, settings[name], seed, arguments.ranks)
            add(f"{name}, seed {seed}", str(folder), texts)


def held_out_chats(path: Path) -> Path:
    """Writes the other prompts with the dense model's answers, as its chat template has them."""
    tokenizer = load_tokenizer(embedded_model_dir())
    prompts = read_prompts(str(ROOT / PROMPTS["other"])).prompts
    answers = read_json(RESULT)["dense"]["answers"]["other"]["texts"]
    chats = [
        [*prompt.messages, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    write_text(
        path, "".join(str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats)
    )
    return path


def trimmed_chats(path: Path) -> Path:
    """Writes the shipped chats with answers of at most TRIMMED tokens."""
    tokenizer, rows = (
        load_tokenizer(embedded_model_dir()),
        map(json.loads, CHATS_FILE.read_text().splitlines()),
    )
    short = [
        row | {"completion": tokenizer.decode(tokenizer.encode(row["completion"])[:TRIMMED])}
        for row in rows
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in short))
    return path


def add(key: str, model: str, texts: dict[str, Path]) -> None:
    """Measures a model, unless the file has its result. Adds texts that an earlier result lacks."""
    earlier = read_json(RESULT).get(key) if RESULT.exists() else None
    missing = {
        name: path for name, path in texts.items() if earlier and name not in earlier["perplexity"]
    }
    if earlier and not missing:
        return
    if earlier:
        earlier["perplexity"] |= perplexities(model, missing)
    add_to(RESULT, key, earlier or measured(model, texts))
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
    run_base(
        ranks, [*(f"{key}={value}" for key, value in common.items()), *settings], "--resume", "auto"
    )


def measured(model: str, texts: dict[str, Path]) -> dict[str, Any]:
    answers = {name: written(model, prompts) for name, prompts in PROMPTS.items()}
    perplexity = perplexities(model, texts)
    tasks = evaluated(model, "--tasks", "reasoning_gym")["measured"]
    exact_match = tasks["values"]["exact match"]["value"]
    row = {"answers": answers, "perplexity": perplexity, "exact_match": exact_match}
    if model == "embedded":
        return row
    report = read_json(Path(model) / "report.json")
    linears = report["measured"]["values"]["linear parameters"]
    removed = 1 - linears["value"] / linears["dense"]
    settings = {key: report["config"][key] for key in ("data", "prune", "train")}
    return row | {"removed_linear_fraction": removed, "held_out": report["perplexity"], **settings}


def perplexities(model: str, texts: dict[str, Path]) -> dict[str, float]:
    return {
        name: evaluated(model, "--text", str(path), *WINDOWS)["perplexity"]
        for name, path in texts.items()
    }


def written(model: str, prompts: str) -> dict[str, Any]:
    """Returns the means over greedy answers, their median length, and the texts."""
    dense = [] if model == "embedded" else ["--dense", "embedded"]
    greedy = evaluated(model, *dense, "--answers", prompts)["answers"]["greedy"]
    texts = greedy["texts"]
    means = {
        key: greedy[key]
        for key in ("ended", "repetition", "empty", "tokens", "dense_perplexity", "by_kind")
    }
    means["median_tokens"] = statistics.median(answer["tokens"] for answer in texts)
    return means | {"texts": [answer["text"] for answer in texts]}


if __name__ == "__main__":
    main()
