"""Runs tasks by name. A name with reasoning-gym's prefix is its own, all others are lm-eval's."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loraprune_ds.errors import require
from loraprune_ds.evaluate import reasoning, zeroshot
from loraprune_ds.evaluate.settings import GYM, TaskSettings
from loraprune_ds.zero.comm import Communicator


def check_tasks(settings: TaskSettings) -> None:
    """Checks that the packages are installed and can load all tasks. Raises UserError naming the first that fails."""
    gym, others = _of_gym(settings), _of_lm_eval(settings)
    require(bool(others.names) or settings.include_path is None, f"--include-path has no effect on tasks of {GYM}")
    if others.names:
        zeroshot.check_tasks(others)
    if gym.names:
        reasoning.load_tasks(gym)


def run_tasks(
    settings: TaskSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    comm: Communicator,
) -> dict[str, Any] | None:
    """Runs all tasks. Returns as `zeroshot.run_tasks`, with reasoning-gym's settings below its name. Collective."""
    gym, others = _of_gym(settings), _of_lm_eval(settings)
    judged = zeroshot.run_tasks(others, model, tokenizer, batch_size, comm) if others.names else None
    solved = reasoning.run_tasks(gym, model, tokenizer, batch_size, comm) if gym.names else None
    if comm.rank != 0 or solved is None:
        return judged
    judged = judged or {"results": {}, "settings": {}}
    return {
        "results": judged["results"] | solved["results"],
        "settings": judged["settings"] | {GYM: solved["settings"]},
    }


def _of_gym(settings: TaskSettings) -> TaskSettings:
    names = tuple(name for name in settings.names if name.partition(":")[0] == GYM)
    return replace(settings, names=names, include_path=None)


def _of_lm_eval(settings: TaskSettings) -> TaskSettings:
    return replace(settings, names=tuple(name for name in settings.names if name.partition(":")[0] != GYM))
