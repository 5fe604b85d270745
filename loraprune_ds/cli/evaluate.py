"""Measures a model: perplexity, zero-shot tasks, parameters and bytes, alone or next to a dense one.

%(prog)s MODEL --text FILE --window 128 --max-windows 160 --dtype float32 --json
%(prog)s runs/quickstart --dense embedded --dataset wikitext2 --window 2048
%(prog)s MODEL --tasks paper
%(prog)s runs/quickstart --dense embedded --answers --page answers.html
%(prog)s runs/quickstart --dense embedded --tasks reasoning_gym reasoning_gym:number_sequence:easy
deepspeed --quiet --num_accelerators 2 launch/evaluate.py MODEL --text FILE --sharded     (or torchrun)
deepspeed --module loraprune_ds.cli.evaluate MODEL --text FILE --sharded            (without a checkout)

MODEL is a Hugging Face folder or hub id, stock or pruned, a PEFT LoRA adapter, `embedded`, or the folder of a finished
run. launch/export.py makes a model from a checkpoint.

Perplexity: the text is tokenised once, with special tokens only at its start, and split into adjacent windows. The tail
is dropped. Each window of n tokens gives n - 1 predictions, summed in float64. The result does not depend on the number
of ranks. For a Gemma, BOS replaces the first token of each window. A model with an encoder predicts the targets of
lines like {"source": "2 + 3?", "target": "5"}.

Answers: one process writes them, after perplexity and tasks. A row of PROMPTS.jsonl is {"prompt": "2 + 3?"}. A prompt
may be a list of messages. "kind" and "expected" are optional, for the page, and so is a "target" for exact match and
ROUGE-L. --dense also compares next-token probabilities of both models, on the text or else on the dense model's greedy
answers.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from loraprune_ds.arguments import Parser, at_least, require_option
from loraprune_ds.cli.run import join_ranks
from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import leave, leave_on_error, require, run_command
from loraprune_ds.evaluate import settings
from loraprune_ds.evaluate.result import answers_page, make_result, result_table
from loraprune_ds.files import JsonObject, json_text, read_text, write_text, writes_into
from loraprune_ds.generate import prompts
from loraprune_ds.ranks import job

TASKS_HELP = (
    "lm-eval's names or files, `paper`, reasoning_gym:NAME, or `reasoning_gym` for its default set"
)
DEFAULT_DATASET = "wikitext2"
DEFAULT_SPLIT = "test"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--dense", metavar="MODEL", help="also measure this model, side by side")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, metavar="FILE", help="perplexity on a UTF-8 file")
    about = f"perplexity on a test set by name (default: {DEFAULT_DATASET})"
    text.add_argument("--dataset", choices=settings.DATASETS, help=about)
    parser.add_argument("--split", help=f"of --dataset (default: {DEFAULT_SPLIT})")
    parser.add_argument(
        "--window", type=at_least(2), default=128, metavar="TOKENS", help="default: 128"
    )
    parser.add_argument(
        "--max-windows", type=at_least(1), metavar="N", help="only the first N (default: all)"
    )
    parser.add_argument("--dtype", choices=get_args(Dtype), help="default: the model's own")
    about = "windows or answers at once (default: about 2,048 tokens)"
    parser.add_argument("--batch-size", type=at_least(1), metavar="N", help=about)
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help=TASKS_HELP)
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="more task files")
    parser.add_argument(
        "--num-fewshot", type=at_least(0), metavar="N", help="default: what each task says"
    )
    parser.add_argument(
        "--limit", type=at_least(1), metavar="N", help="documents per task, for trials"
    )
    about = f"write answers and measure them (without a file: {prompts.DEFAULT_PROMPTS}, 50 shipped prompts)"
    parser.add_argument(
        "--answers", nargs="?", const=prompts.DEFAULT_PROMPTS, metavar="PROMPTS.jsonl", help=about
    )
    parser.add_argument(
        "--max-new-tokens", type=at_least(1), metavar="N", help="of an answer (default: 128)"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE.html", help="write the answers side by side"
    )
    parser.add_argument(
        "--sharded", action="store_true", help="spread the weights over the ranks (ZeRO-3)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )
    parser.add_argument("--verbose", action="store_true", help="show the messages of libraries")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0, 1 if a result cannot be written, or 2 for unusable input."""
    job.adopt_srun_ranks()
    # lm-eval can fail on one rank alone
    return run_command(lambda: show(parse_arguments()), agreed=False)


def show(arguments: argparse.Namespace) -> None:
    """Measures, and prints the result on rank 0. Collective."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")  # only for the result
    os.dup2(2, 1)  # other prints, also from C, go to stderr
    result = measure(arguments)
    if os.environ.get("RANK", "0") == "0":
        text = json_text(result, indent=2) if arguments.json else result_table(result)
        with writes_into(Path("standard output")), stdout:
            stdout.write(text)
        if arguments.page:
            with writes_into(arguments.page):
                write_text(arguments.page, answers_page(result))
            print(f"page: {arguments.page}", file=sys.stderr)


def measure(arguments: argparse.Namespace) -> JsonObject:
    """Carries out the evaluation on all ranks. Collective."""
    sharded = arguments.sharded or job.several_ranks(os.environ)
    require_option(arguments, "tasks", "include_path", "num_fewshot", "limit")
    require_option(arguments, "answers", "max_new_tokens", "page")
    chosen = settings.EvaluationSettings(
        window=arguments.window,
        max_windows=arguments.max_windows,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        sharded=arguments.sharded,
        tasks=task_settings(arguments),
        answers=answer_settings(arguments),
    )
    if not arguments.verbose:  # progress bars stay on a terminal
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")
    comm = join_ranks(sharded=sharded, verbose=arguments.verbose)
    # Heavy imports come after the check of arguments, so a typo does not cost ten seconds.
    from tqdm import tqdm

    from loraprune_ds.evaluate.evaluation import evaluate
    from loraprune_ds.evaluate.tasks import check_tasks
    from loraprune_ds.generate.models import find_model
    from loraprune_ds.ranks.comm import stop_ranks
    from loraprune_ds.ranks.device import device_name
    from loraprune_ds.report.report import hardware, versions

    models = [arguments.model]
    if arguments.dense:
        models.append(arguments.dense)
    if tasks := chosen.tasks:
        comm.all_or_raise(lambda: check_tasks(tasks))

    def read_inputs() -> settings.EvaluationText | None:
        for model in models:
            find_model(model)
        return read_evaluation_text(arguments)

    chosen = replace(chosen, text=comm.first_per_node(read_inputs))
    disable = None if comm.rank == 0 else True  # None: without a terminal
    bar = partial(tqdm, unit="batch", leave=False, disable=disable)
    measurements = evaluate(models, chosen, comm, bar)
    provenance = {"versions": versions(), "hardware": hardware(device_name())}
    result = make_result(measurements, chosen, comm.world_size, provenance)
    stop_ranks()  # not after an error, because NCCL would wait for ranks that wait for this one
    return result


def task_settings(arguments: argparse.Namespace) -> settings.TaskSettings | None:
    names = tuple(name for name in ",".join(arguments.tasks).split(",") if name)
    if not names:
        return None
    return settings.TaskSettings(
        names, arguments.include_path, arguments.num_fewshot, arguments.limit
    )


def answer_settings(arguments: argparse.Namespace) -> prompts.AnswerSettings | None:
    """Reads the prompts, and checks that the page can be written, before any long work."""
    if arguments.answers is None:
        return None
    require(
        os.environ.get("WORLD_SIZE", "1") == "1",
        "--answers writes on one rank; start it without a launcher",
    )
    if page := arguments.page:
        require(
            page.suffix == ".html" and not page.is_dir(),
            f"--page {page}: give it the name of an .html file",
        )
        require(
            os.access(page.parent, os.W_OK),
            f"--page {page}: {page.parent} is not a writable folder",
        )
    if arguments.max_new_tokens is None:
        return prompts.read_prompts(arguments.answers)
    return prompts.read_prompts(arguments.answers, max_new_tokens=arguments.max_new_tokens)


def read_evaluation_text(arguments: argparse.Namespace) -> settings.EvaluationText | None:
    """Reads the text that the user names. The default is WikiText-2, or no text if another measurement is asked for."""
    require(
        not (arguments.text and arguments.split),
        "--split needs --dataset; --text is always read completely",
    )
    if arguments.text:
        text = read_text(arguments.text, "--text")
        return settings.EvaluationText(arguments.text.name, None, text)
    if not arguments.dataset and (arguments.tasks or arguments.answers):
        for option, value in (
            ("--split", arguments.split),
            ("--max-windows", arguments.max_windows),
        ):
            require(value is None, f"{option} has no effect without --dataset or --text")
        return None
    return settings.load_dataset_text(
        arguments.dataset or DEFAULT_DATASET, arguments.split or DEFAULT_SPLIT
    )


if __name__ == "__main__":
    leave_on_error()
    leave(main())
