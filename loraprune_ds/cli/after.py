"""Measures the exported model after a run, in a separate process. The ranks have freed their models."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import RunError, UserError
from loraprune_ds.evaluate.settings import GYM, TaskSettings
from loraprune_ds.files import read_json, write_json, write_text, writes_into
from loraprune_ds.generate.prompts import DEFAULT_PROMPTS, read_prompts
from loraprune_ds.report.measured import read_measured
from loraprune_ds.report.records import ANSWERS_PAGE, EVALUATION_FILE, REPORT_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWERS = "answers"
TASKS = "tasks"
RANK = {  # a rank's own, with its share of the cores
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_STEP_NUM_TASKS",
    "OMP_NUM_THREADS",
}


def check_after(config: RunConfig) -> None:
    """Checks that the tasks of `evaluate.after`, and the base model of an adapter, can be found."""
    names = config.evaluate.after
    if tasks := _tasks(names):
        from loraprune_ds.evaluate.tasks import check_tasks

        try:
            check_tasks(TaskSettings(tasks))
        except UserError as error:
            raise UserError(str(error).replace("--tasks", "evaluate.after", 1)) from None
    if names and config.model.adapter:
        from loraprune_ds.generate.models import find_model

        find_model(config.model.adapter)


def check_prompts(
    config: RunConfig, tokenizer: "PreTrainedTokenizerBase", positions: int | None, vocab_size: int
) -> None:
    """Checks that template, positions and vocabulary of the model accept the shipped prompts."""
    if ANSWERS in config.evaluate.after:
        from loraprune_ds.generate.encoding import encode_prompts

        limits = (config.model.path, positions, vocab_size)
        encode_prompts(read_prompts(DEFAULT_PROMPTS), tokenizer, limits, "evaluate.after")


def measure_after(config: RunConfig, folder: Path, say: Callable[[str], object]) -> None:
    """Makes the measurements of `evaluate.after` that report.json lacks. On rank 0 only. Raises RunError."""
    names = config.evaluate.after
    report = read_json(folder / REPORT_FILE)
    if not names or report.get("after") == names:
        return
    from loraprune_ds.pretrained.sources import locate_model

    dense = config.model.adapter or str(locate_model(config.model))
    options = ["--dense", dense, "--json", "--dtype", config.model.dtype]
    page: list[str] = []
    if ANSWERS in names:
        options.append("--answers")
        page = ["--page", str(folder / ANSWERS_PAGE)]
    if tasks := _tasks(names):
        options += ["--tasks", *tasks]
    read_measured(report, folder / REPORT_FILE)  # or of another version
    say(f"measuring {', '.join(names)} of the exported and the dense model")
    text = _evaluate(folder, [str(folder), *page, *options])
    report["measured"]["values"] |= json.loads(text)["measured"]["values"]
    report["after"] = names
    with writes_into(folder):
        write_text(folder / EVALUATION_FILE, text)
        write_json(folder / REPORT_FILE, report)


def _evaluate(folder: Path, arguments: list[str]) -> str:
    """Runs launch/evaluate.py, and returns its JSON."""
    command = [sys.executable, "-m", "loraprune_ds.cli.evaluate", *arguments]
    # With torchrun's variables the process would wait for the store of other ranks.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK and not name.startswith("TORCHELASTIC_")
    }
    process = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if process.returncode != 0:
        raise RunError(
            f"evaluate.after failed with code {process.returncode}; "
            f"{folder} holds the finished run; start it again to measure again"
        )
    return process.stdout


def _tasks(names: list[str]) -> tuple[str, ...]:
    return tuple(GYM if name == TASKS else name for name in names if name != ANSWERS)
