"""Writes traces of single steps, for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import require

PROFILE_FOLDER = "profile"


def check_profile_steps(config: RunConfig, steps: int) -> None:
    """Checks `logging.profile_steps` against the steps of the run. With epochs, only the data tells these.

    Raises:
        UserError: one of them will never come.
    """
    last = max(config.logging.profile_steps or [0])
    require(last <= steps, f"logging.profile_steps names step {last}, but the run ends at step {steps}")


@contextmanager
def profiled(config: RunConfig, step: int, rank: int) -> Iterator[None]:
    """Profiles this step if `logging.profile_steps` names it. Writes `profile/step-N.json` on rank 0."""
    if rank != 0 or step not in (config.logging.profile_steps or []):
        yield
        return
    with torch.profiler.profile() as profiler:
        yield
    folder = Path(config.output_dir) / PROFILE_FOLDER
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"step-{step}.json"))
