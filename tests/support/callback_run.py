"""Trains in a Trainer: deepspeed --num_accelerators 2 tests/support/callback_run.py MATERIAL OUT (resumes)."""

import pickle
import sys
from pathlib import Path

import deepspeed

from tests.support.driver import Job, tiny_job
from tests.support.paper import PAPER
from tests.support.trainers import train_with_callback

STEPS = 10
PRUNE = PAPER | {
    "ratio": 0.4,
    "prune_every": 2,
    "cooldown_fraction": 0.3,
    "channel_multiple": 1,
}  # cuts after 3, 5 and 7
SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def make_job(folder: Path) -> Job:
    """Writes the model and the adapter that all starts begin with. They are the same each time."""
    sizes = {"heads": 8, "kv_heads": 4, "hidden": 64, "ffn": 160, "layers": 4}
    return tiny_job(folder, PRUNE, steps=STEPS, samples=8, model=sizes, max_grad_norm=0.5)


def main(material: Path, out: Path) -> None:
    deepspeed.init_distributed("gloo")
    train_with_callback(pickle.loads((material / "job").read_bytes()), out, SAVES, str(out))


if __name__ == "__main__":
    main(*map(Path, sys.argv[-2:]))
