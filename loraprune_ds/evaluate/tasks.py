"""Tasks by name. Those with its prefix come from reasoning-gym, all others from EleutherAI's lm-evaluation-harness.

Both packages are optional, and imported only when used.
"""

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.evaluate.settings import GYM, TaskSettings, did_you_mean
from loraprune_ds.ranks import Ranks

if TYPE_CHECKING:  # launch/compare.py only reads results, and must not wait for these imports
    from torch import Tensor

    from loraprune_ds.evaluate.models import Writer

# The seven of the LoRAPrune paper (Zhang et al., Findings of ACL 2024), by their names in lm-eval.
PAPER_TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
PAPER = "paper"
SEEDS = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed", "limit", "batch_size")


def check_tasks(settings: TaskSettings) -> None:
    """Checks that the packages are installed and can load all tasks. Raises UserError with the first that fails."""
    gym, others = _split(settings)
    require(bool(others.names) or settings.include_path is None, f"--include-path has no effect on tasks of {GYM}")
    if gym.names:
        from loraprune_ds.evaluate.reasoning import load_tasks

        load_tasks(gym)
    if not others.names:
        return
    found = importlib.util.find_spec("lm_eval") is not None
    require(found, "--tasks needs the package lm-eval: pip install 'lm-eval[hf]'")
    folder = settings.include_path
    require(folder is None or folder.is_dir(), f"--include-path: {folder} is not a folder")
    known = _task_manager(folder).all_tasks
    for name in _expand(others.names):
        if name not in known and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            hint = did_you_mean(name, known) or "; see `lm-eval ls tasks`"
            raise UserError(f"--tasks: lm-eval knows no task {name}{hint}")


def run_tasks(settings: TaskSettings, writer: "Writer", batch_size: int, comm: Ranks) -> dict[str, Any] | None:
    """Runs all tasks. Collective.

    Returns:
        On rank 0 {"results": {task: {metric: value}}, "settings": …}, with lm-eval's metric names, and
        reasoning-gym's settings under its name. None elsewhere.
    """
    gym, others = _split(settings)
    judged, solved = _run_lm_eval(others, writer, batch_size, comm) if others.names else None, None
    if gym.names:
        from loraprune_ds.evaluate import reasoning

        solved = reasoning.run_gym_tasks(gym, writer, batch_size, comm)
    if comm.rank != 0 or solved is None:
        return judged
    judged = judged or {"results": {}, "settings": {}}
    settings_of_both = judged["settings"] | {GYM: solved["settings"]}
    return {"results": judged["results"] | solved["results"], "settings": settings_of_both}


def mean_metric(tasks: dict[str, Any], metric: str) -> float | None:
    """Returns the mean over the tasks with a metric, such as "acc" or "exact_match". None without such tasks."""
    values = [tasks["results"][name][f"{metric},none"] for name in tasks_with(tasks, metric)]
    return sum(values) / len(values) if values else None


def tasks_with(tasks: dict[str, Any], metric: str) -> list[str]:
    return [name for name, metrics in tasks["results"].items() if f"{metric},none" in metrics]


def _split(settings: TaskSettings) -> tuple[TaskSettings, TaskSettings]:
    """Returns the settings of reasoning-gym's tasks and of lm-eval's."""
    gym = tuple(name for name in settings.names if name.partition(":")[0] == GYM)
    others = tuple(name for name in settings.names if name not in gym)
    return replace(settings, names=gym, include_path=None), replace(settings, names=others)


def _run_lm_eval(settings: TaskSettings, writer: "Writer", batch_size: int, comm: Ranks) -> dict[str, Any] | None:
    """Runs the tasks. Rank r takes documents r, r + world_size, and so on. Collective."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        answer = _lm_eval("").simple_evaluate(
            _model_on_ranks(writer, batch_size, comm),
            tasks=list(_expand(settings.names)),
            task_manager=_task_manager(settings.include_path),
            num_fewshot=settings.fewshot,
            batch_size=batch_size,
            limit=settings.limit,
            log_samples=False,
        )
    except Exception as error:  # a task file can hold any code, and `datasets` raises anything
        raise UserError(f"--tasks {' '.join(settings.names)}: {one_line(error)}") from error
    if comm.rank != 0:
        return None
    reported = {
        "lm_eval": answer["lm_eval_version"],
        "fewshot": answer["n-shot"],
        "versions": answer["versions"],
        "documents": answer["n-samples"],
        "max_length": answer["max_length"],
        "chat_template": answer.get("chat_template"),
        **{key: answer["config"].get(key) for key in SEEDS},
    }
    return {"results": answer["results"], "settings": reported}


def _model_on_ranks(writer: "Writer", batch_size: int, comm: Ranks) -> Any:
    """Wraps a loaded model for lm-eval, which deals documents out to ranks only under `accelerate launch`."""
    base: Any = _lm_eval(".models.huggingface").HFLM

    class ModelOnRanks(base):
        def __init__(self) -> None:
            backend = "seq2seq" if writer.model.config.is_encoder_decoder else "causal"
            super().__init__(writer.model, backend, tokenizer=writer.tokenizer, batch_size=batch_size)
            self._rank = comm.rank
            self._world_size = comm.world_size

        def all_gather(self, tensor: "Tensor") -> "Tensor":
            """Gathers a scalar from every rank: (world_size,)."""
            return comm.all_gather(tensor.view(1)).flatten()

        def barrier(self) -> None:
            comm.barrier()

    return ModelOnRanks()


def _expand(names: Sequence[str]) -> list[str]:
    expanded = [task for name in names for task in (PAPER_TASKS if name == PAPER else (name,))]
    return list(dict.fromkeys(expanded))


@cache
def _task_manager(include_path: Path | None) -> Any:
    """Makes lm-eval's index of all task files, which takes seconds."""
    return _lm_eval(".tasks").TaskManager(include_path=include_path)


def _lm_eval(module: str) -> Any:
    """Imports a module of lm-eval, which may not be installed where types are checked."""
    return importlib.import_module(f"lm_eval{module}")
