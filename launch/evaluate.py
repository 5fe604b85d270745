"""Measures a model: perplexity, zero-shot tasks, parameters, MACs, speed and memory, alone or beside a dense one.

launch/evaluate.py MODEL --text FILE --window 128 --max-windows 160 --dtype float32 --json
launch/evaluate.py runs/quickstart --dense embedded --dataset wikitext2 --window 2048 --speed
launch/evaluate.py MODEL --tasks paper
deepspeed --quiet --num_accelerators 2 launch/evaluate.py MODEL --text FILE --sharded     (or torchrun)

MODEL is a Hugging Face folder or hub id, stock or pruned, a PEFT LoRA adapter, the folder of a run or of one of its
checkpoints (an unfinished run: its newest good one), or `embedded`.

Perplexity: the text is tokenised once, with the special tokens the tokenizer adds at its start, and cut into windows
side by side; the tail is dropped, and each window of n tokens gives n - 1 predictions, summed in float64. With
--sliding S a window begins every S tokens and predicts only what no window before it held, so that every token but
the first is predicted once. Either number is the same on any number of ranks.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TextIO

try:
    from loraprune_ds.command import Parser, adopt_srun_ranks, leave, leave_on_error, silence_libraries, tell
    from loraprune_ds.config import DTYPES
    from loraprune_ds.errors import UserError
    from loraprune_ds.evaluate.texts import DATASETS, EvaluationText, load_dataset_text, read_text
    from loraprune_ds.zero.environment import collective_timeout
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes")

if TYPE_CHECKING:
    from loraprune_ds.evaluate.candidates import EvaluationPlan
    from loraprune_ds.zero.comm import Communicator

DEFAULT_DATASET, DEFAULT_SPLIT = "wikitext2", "test"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--dense", metavar="MODEL", help="measure this one too, side by side")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, metavar="FILE", help="perplexity on a UTF-8 file")
    text.add_argument(
        "--dataset", choices=DATASETS, help=f"perplexity on a test set by name (default: {DEFAULT_DATASET})"
    )
    parser.add_argument("--split", help=f"of --dataset (default: {DEFAULT_SPLIT})")
    parser.add_argument("--window", type=int, default=128, metavar="TOKENS", help="default: 128")
    parser.add_argument("--sliding", type=int, metavar="STRIDE", help="sliding windows, one every STRIDE tokens")
    parser.add_argument("--max-windows", type=int, metavar="N", help="only the first N (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the model's own")
    parser.add_argument("--batch-size", type=int, metavar="N", help="windows at once (default: about 2,048 tokens)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval's names, files, or `paper`")
    parser.add_argument("--include-path", type=Path, metavar="FOLDER", help="more task files")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="default: what each task says")
    parser.add_argument("--limit", type=int, metavar="N", help="documents per task, to try things")
    parser.add_argument("--speed", action="store_true", help="prefill and decode tokens per second")
    parser.add_argument("--sharded", action="store_true", help="spread the weights over the ranks (ZeRO-3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--verbose", action="store_true", help="let the libraries speak")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by the launcher
    return parser.parse_args()


def main() -> int:
    """Returns the exit code: 0, or 2 for unusable input."""
    adopt_srun_ranks()
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        arguments = parse_arguments()
        stdout = keep_stdout()
        result = measure(arguments)
    except UserError as error:
        tell(error, agreed=False)  # lm-eval can fail on one rank alone
        return error.exit_code
    if is_main:
        write_result(result, stdout, as_json=arguments.json)
    return 0


def keep_stdout() -> TextIO:
    """The standard output, for the result alone: whatever else prints, libraries in C included, goes to stderr."""
    result_file = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return result_file


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Carries out the evaluation on all ranks. Collective."""
    collective_timeout(os.environ)  # to be told of a wrong one before DeepSpeed is imported
    if not arguments.verbose:
        silence_evaluation()
    # Heavy imports come after the arguments are known to be good: a typo should not cost ten seconds.
    from loraprune_ds.evaluate.evaluation import evaluate
    from loraprune_ds.evaluate.result import make_result
    from loraprune_ds.train.provenance import hardware, versions
    from loraprune_ds.zero.device import device_name
    from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks, stop_ranks

    if not arguments.verbose:
        quiet_deepspeed()
    comm = start_ranks()
    # One rank per node downloads, converts or merges; the others then find it in the node's cache.
    first = os.environ["LOCAL_RANK"] == "0"
    given = [arguments.model, *([arguments.dense] if arguments.dense else [])]
    with readable(given, comm, is_first_on_node=first) as paths:
        with comm.patient() as waiting:
            waiting.all_or_raise(lambda: read_evaluation_text(arguments) if first else None)
        plan = comm.all_or_raise(lambda: make_plan(arguments))
        measured = evaluate(paths, plan, comm, show_progress)
    named = [replace(model, path=path) for model, path in zip(measured, given, strict=True)]
    result = make_result(named, plan, comm.world_size, {"versions": versions(), "hardware": hardware(device_name())})
    stop_ranks()  # not after an error: NCCL would wait there for the ranks that wait for this one
    return result


@contextmanager
def readable(paths: list[str], comm: "Communicator", *, is_first_on_node: bool) -> Iterator[list[str]]:
    """The same models, found; what a run has not merged yet is in a folder that is gone afterwards."""
    with ExitStack() as stack:
        scratch = None
        if is_first_on_node:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="evaluate-")))
        with comm.patient() as waiting:
            found = waiting.all_or_raise(
                lambda: [find_or_merge(path, scratch / str(i)) for i, path in enumerate(paths)] if scratch else None
            )
        # The ranks of a node follow its first one.
        yield next(names for names in reversed(comm.gather_objects(found)[: comm.rank + 1]) if names)


def find_or_merge(path: str, out: Path) -> str:
    """The path of a model to load: `out`, if `path` is a checkpoint of a run or an unfinished run, else itself."""
    from loraprune_ds.checkpoint.run_folder import STATUS_FILE
    from loraprune_ds.checkpoint.state import STATE_FILE
    from loraprune_ds.evaluate.models import find_model
    from loraprune_ds.export.formats import NoRoom, export, find_source

    if any((Path(path) / name).is_file() for name in (STATUS_FILE, STATE_FILE)):
        source = find_source(Path(path))
        if source.model is None:
            try:
                remarks = export(source, "hf", out)
            except NoRoom as error:
                raise UserError(f"{path} is to be merged first: {error}; TMPDIR names another folder") from None
            for remark in remarks:
                print(f"note: {path}: {remark}", file=sys.stderr)
            return str(out)
    find_model(path)
    return path


def make_plan(arguments: argparse.Namespace) -> "EvaluationPlan":
    from loraprune_ds.evaluate.candidates import EvaluationPlan, PerplexityProtocol
    from loraprune_ds.evaluate.speed import SpeedPlan
    from loraprune_ds.evaluate.zeroshot import TaskPlan

    names = tuple(name for item in arguments.tasks for name in item.split(",") if name)
    tasks = TaskPlan(names, arguments.include_path, arguments.num_fewshot, arguments.limit)
    return EvaluationPlan(
        PerplexityProtocol(arguments.window, arguments.sliding, arguments.max_windows),
        text=read_evaluation_text(arguments),
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        tasks=tasks if names else None,
        speed=SpeedPlan() if arguments.speed else None,
        sharded=arguments.sharded,
    )


def read_evaluation_text(arguments: argparse.Namespace) -> EvaluationText | None:
    """WikiText-2 unless another text is named or something else is to be measured."""
    if arguments.text and arguments.split:
        raise UserError("--split is a part of --dataset; --text is read whole")
    if arguments.text:
        return read_text(arguments.text)
    if not arguments.dataset and (arguments.tasks or arguments.speed):
        return None
    return load_dataset_text(arguments.dataset or DEFAULT_DATASET, arguments.split or DEFAULT_SPLIT)


def show_progress(rounds: Iterable[int]) -> Iterable[int]:
    """A bar on a terminal, of rank 0."""
    from tqdm import tqdm

    is_main = os.environ.get("RANK", "0") == "0"
    return tqdm(rounds, desc="perplexity", unit="batch", leave=False, disable=None if is_main else True)


def silence_evaluation() -> None:
    """Leaves only what the evaluation itself has to say; the libraries' bars stay on a terminal."""
    silence_libraries()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def write_result(result: dict[str, Any], out: TextIO, *, as_json: bool) -> None:
    from loraprune_ds.evaluate.result import result_table
    from loraprune_ds.files import finite

    with out:
        out.write(json.dumps(finite(result), indent=2, allow_nan=False) + "\n" if as_json else result_table(result))


if __name__ == "__main__":
    leave_on_error()
    leave(main())
