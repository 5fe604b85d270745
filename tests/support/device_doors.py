"""The commands of launch/ in one process of a pool, on its own device."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

from loraprune_ds.cli import chats, evaluate, run
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.ranks import comm

T = TypeVar("T")


def run_and_measure(
    config: Path, settings: list[str], out: Path, prompts: Path
) -> tuple[float, Any]:
    """Runs to the end, then measures the result. Returns its perplexity and its answers."""
    overrides = [f"--set={setting}" for setting in (f"output_dir={out}", *settings)]
    assert _command(run.main, "--config", config, *overrides, "--resume", "auto") == 0
    asked = [out, "--text", config.with_name("text.txt"), "--window", 24, "--max-windows", 8]
    asked += ["--answers", prompts, "--max-new-tokens", 12]
    measured = _command(lambda: evaluate.measure(evaluate.parse_arguments()), *asked)
    return measured["perplexity"], measured["answers"]


def write_chats(model: Path, out: Path) -> tuple[str, JsonObject]:
    """Returns the chats that a model writes itself, and their settings."""
    asked = ["--out", out, "--tokens", 150, "--max-new-tokens", 40, "--engine", "transformers"]
    _command(lambda: chats.write(chats.parse_arguments()), model, *asked)
    return out.read_text(), read_json(out.with_suffix(".settings.json"))


def _command(main: Callable[[], T], *words: Any) -> T:
    """Calls a command's function with these words. The ranks of the pool stay joined."""
    with patch.object(sys, "argv", ["command", *map(str, words)]), patch.object(comm, "stop_ranks"):
        return main()
