"""Zero-shot tasks through EleutherAI's lm-evaluation-harness (the optional package `lm-eval`)."""

import difflib
import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune_ds.errors import UserError, one_line

if TYPE_CHECKING:  # launch/compare.py reads results and need not wait for it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The seven of the LoRAPrune paper (Zhang et al., Findings of ACL 2024), under lm-eval's names.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PAPER = "paper"
INSTALL = "pip install 'lm-eval[hf]'"


@dataclass(frozen=True)
class TaskPlan:
    """What to run. `names`: tasks, groups or tags of lm-eval or of `include_path`, paths of task files, or `paper`.

    `fewshot` None: what each task says, which is 0 for the paper's seven; `limit`: documents per task, to try things.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    fewshot: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for option, value, least in (("--num-fewshot", self.fewshot, 0), ("--limit", self.limit, 1)):
            if value is not None and value < least:
                raise UserError(f"{option} must be at least {least}; got {value}")
            if value is not None and not self.names:
                raise UserError(f"{option} has no effect without --tasks")
        if self.include_path and not self.names:
            raise UserError("--include-path has no effect without --tasks")


def check_tasks(plan: TaskPlan) -> None:
    """Raises UserError, one line, if lm-eval is missing or does not know a task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks needs the package lm-eval: {INSTALL}")
    if plan.include_path and not plan.include_path.is_dir():
        raise UserError(f"--include-path: {plan.include_path} is not a folder")
    known = _task_manager(plan.include_path).all_tasks
    for name in _expand(plan.names):
        if name not in known and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else "; see `lm-eval ls tasks`"
            raise UserError(f"--tasks: lm-eval knows no task {name}{hint}")


def run_tasks(
    plan: TaskPlan,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, Any] | None:
    """What lm-eval measures, with the settings it used; rank r takes every W-th document from the r-th on. Collective.

    Returns:
        On rank 0 {"results": {task: {metric: value}}, "settings": …}, in lm-eval's own names of metrics; else None.

    Raises:
        UserError: a task's data cannot be had, or its file is wrong.
    """
    from loraprune_ds.evaluate.harness import RankedLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        found = _lm_eval("").simple_evaluate(
            RankedLM(model, tokenizer, batch_size, rank, world_size),
            tasks=list(_expand(plan.names)),
            task_manager=_task_manager(plan.include_path),
            num_fewshot=plan.fewshot,
            batch_size=batch_size,
            limit=plan.limit,
            log_samples=False,
        )
    except Exception as error:  # a task file can hold any code, and `datasets` raises anything
        reason = one_line(error)
        raise UserError(f"--tasks {' '.join(plan.names)}: {reason}") from error
    return {"results": found["results"], "settings": _settings(found)} if rank == 0 else None


def mean_accuracy(tasks: dict[str, Any]) -> float | None:
    """The mean of plain accuracy ("acc") over the tasks that have one; None if none has."""
    accuracies = [metrics["acc,none"] for metrics in tasks["results"].values() if "acc,none" in metrics]
    return sum(accuracies) / len(accuracies) if accuracies else None


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    """All that a number depends on beside model and data."""
    seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed", "limit", "batch_size")
    return {
        "lm_eval": found["lm_eval_version"],
        "fewshot": found["n-shot"],
        "versions": found["versions"],
        "documents": found["n-samples"],
        "max_length": found["max_length"],
        "chat_template": found.get("chat_template"),
        **{key: found["config"].get(key) for key in seeds},
    }


def _expand(names: Sequence[str]) -> list[str]:
    expanded = [task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))]
    return list(dict.fromkeys(expanded))


@cache
def _task_manager(include_path: Path | None) -> Any:
    """lm-eval's index of all task files, which takes seconds to make."""
    return _lm_eval(".tasks").TaskManager(include_path=include_path)


def _lm_eval(module: str) -> Any:
    """A module of lm-eval, which need not be installed where types are checked."""
    return importlib.import_module(f"lm_eval{module}")
