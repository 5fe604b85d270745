"""Compares four ways to recover SmolLM2-135M-Instruct while 41.7 % are removed, three of them in the callback.

    python -m tests.benchmarks.own_texts --test test.raw [--work FOLDER] [--seeds 0 1 2] [--steps 80] [--ranks 1]

All have the same 200 prompts, and as many tokens in the pruned model's passes as `own` has in its steps:

    own         gkd.py: reverse divergence from the dense model, on what the pruned model samples
    distilled   gkd.py: forward divergence from the dense model, on its own greedy answers
    sft         sft.py: cross-entropy on these answers
    recipe      launch/run.py with the default recipe: these answers as chats

They are measured on the other prompts of `launch/evaluate.py --answers`, on tasks and on a text.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from trl.trainer.distillation_trainer import DistillationTrainer

from loraprune_ds.evaluate.models import Ids, end_ids, find_model, generate, load_model
from loraprune_ds.files import read_json
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.tokenizer import load_tokenizer
from loraprune_ds.report.records import history_from, read_metrics
from tests.benchmarks.expanded import expanded_model
from tests.benchmarks.quality import perplexity, writing
from tests.benchmarks.quality_settings import SETTINGS
from tests.benchmarks.running import RESULTS, ROOT, add_to, make_parser, run_quickstart
from tests.hf.trainers import run_example
from tests.ranks import RankPool

LENGTH = 96  # tokens of an answer, at most
SHORT = 32  # of the pruned model's texts: their ends teach little (arXiv 2605.31490), and cost most
BATCH, CUTS = 16, 8
ASKED = """Explain {} to a child.|Write two sentences about {}.|What is {} good for?|List three facts about {}.
What would you ask an expert on {}?|Write a short poem about {}.|Give a tip for a beginner in {}.|Define {} in one line.
Why do people care about {}?|Write a headline for an article on {}."""
TOPICS = """rain,chess,bread,the moon,gardening,bicycles,coffee,photography,honey bees,trains,mathematics,sleep,music,
earthquakes,recycling,libraries,swimming,clouds,languages,maps"""
OPTIONS = """--ratio 0.417 --deepspeed ds_configs/zero3.json --use_cpu true --bf16 true
--learning_rate 2e-3 --warmup_steps 0.1 --gradient_accumulation_steps 1 --gradient_checkpointing false
--save_strategy no --report_to none --logging_steps 1 --disable_tqdm true --model_init_kwargs"""
IN_BF16 = json.dumps({"dtype": "bfloat16"})
DISTIL = ["--teacher_model_init_kwargs", IN_BF16]
SCRIPTS = {  # own comes first
    "own": ("gkd.py", [*DISTIL, "--max_completion_length", str(SHORT), "--beta", "1"]),
    "distilled": ("gkd.py", [*DISTIL, "--max_completion_length", str(LENGTH), "--beta", "0"]),
    "sft": ("sft.py", ["--completion_only_loss", "true"]),
}
Answers = dict[tuple[int, ...], Ids]  # by the ids of the prompt


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--test", type=Path, required=True, help="text to measure on")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "own_texts", help="default: runs/own_texts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80, help="of own: 16 texts each")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2))
    parser.add_argument("--only", nargs="+", choices=[*SCRIPTS, "recipe"], default=[*SCRIPTS, "recipe"])
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = expanded_model(embedded_model_dir(), arguments.work / "expanded")
    answers = prepare_answers(model, arguments.work)
    per_step = BATCH * sum(len(prompt) + len(answer) for prompt, answer in answers.items()) / len(answers)
    ranks = RankPool()
    for seed in arguments.seeds:
        steps = arguments.steps
        for name in arguments.only:
            out = arguments.work / f"{name}-s{seed}"
            if name == "recipe":
                run_recipe(model, out, steps, seed)
            elif not (out / "model").exists():
                script, options = SCRIPTS[name]
                data = arguments.work / ("prompts.jsonl" if script == "gkd.py" else "answers.jsonl")
                numbers = {"max_steps": steps, "prune_every": steps // CUTS, "seed": seed, "output_dir": out}
                numbers["per_device_train_batch_size"] = BATCH // arguments.ranks
                more = [f"--{key}={value}" for key, value in numbers.items()]
                argv = [str(model), str(data), *OPTIONS.split(), IN_BF16, *options, *more]
                given = answers if name == "distilled" else None
                ranks.run(arguments.ranks, train, script, argv, given, timeout=36_000)
            result = measure(out, arguments.test)
            add_to(RESULTS / "own_texts.json", out.name, result)
            steps = round(result["tokens"] / per_step) if name == "own" else steps
    ranks.close()


def train(script: str, argv: list[str], answers: Answers | None) -> None:
    """Runs an example on this rank. With `answers` its trainer takes them instead of generating."""

    def look_up(trainer: Any, prompts: list[Ids], *_: Any) -> list[Ids]:
        return [(answers or {})[tuple(prompt)] for prompt in prompts]

    with patch.object(DistillationTrainer, "_generate_single_turn", look_up) if answers else nullcontext():
        run_example(script, argv, torch.arange(32)[None])


def run_recipe(model: Path, out: Path, steps: int, seed: int) -> None:
    chats = out.parent / "chats.jsonl"
    data = (f"model.path={model}", f"data.path={chats}", "data.format=chat", "data.window=160", f"output_dir={out}")
    numbers = (f"train.steps={steps}", f"train.global_batch_size={BATCH}", f"prune.prune_every={steps // CUTS}")
    run_quickstart(1, (*SETTINGS["recipe"].overrides, *data, *numbers, f"seed={seed}"), "--resume", "auto")


def prepare_answers(model: Path, work: Path) -> Answers:
    """Writes the prompts, and the dense model's greedy answers as chats and rows of sft.py, unless they are there."""
    path = work / "answers.jsonl"
    if not path.exists():
        kinds, topics = ASKED.replace("\n", "|").split("|"), TOPICS.replace("\n", "").split(",")
        chats = [[{"role": "user", "content": kind.format(topic)}] for kind in kinds for topic in topics]
        write_lines(work / "prompts.jsonl", [{"prompt": chat} for chat in chats])
        dense, tokenizer = load_model(find_model(str(model)), "bfloat16", torch.device("cpu")), load_tokenizer(model)
        made: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)
        prompts, ends = list(made["input_ids"]), end_ids(dense, tokenizer)
        batches = (prompts[i : i + 40] for i in range(0, len(prompts), 40))
        written = [x for batch in batches for x in generate(dense, batch, ends, max_new_tokens=LENGTH, do_sample=False)]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        said = [[{"role": "assistant", "content": text}] for text in texts]
        both = zip(chats, said, strict=True)
        write_lines(work / "chats.jsonl", [{"prompt": chat, "completion": answer} for chat, answer in both])
        masks = [[0] * len(p) + [1] * len(a) for p, a in zip(prompts, written, strict=True)]
        rows = zip(prompts, written, masks, strict=True)
        write_lines(path, [{"input_ids": [*p, *a], "completion_mask": mask} for p, a, mask in rows])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    starts = [row["completion_mask"].index(1) for row in rows]
    return {tuple(x["input_ids"][:n]): x["input_ids"][n:] for x, n in zip(rows, starts, strict=True)}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(out: Path, text: Path) -> dict[str, Any]:
    history, params = history_from(read_metrics(out / "metrics.jsonl")), read_json(out / "report.json")["params"]
    return {
        "steps": len(history.steps),
        "tokens": sum(step.tokens for step in history.steps),
        "seconds": sum(step.seconds for step in history.steps),
        "removed_linear_fraction": 1 - params["linear_pruned"] / params["linear_dense"],
        "perplexity": perplexity(str(out / "model"), text),
        "writing": writing(str(out / "model")),
    }


if __name__ == "__main__":
    main()
