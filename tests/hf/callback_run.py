"""Trains in transformers' Trainer on a launcher's ranks, from the newest checkpoint of its folder on, if there is one.

deepspeed --num_accelerators 2 tests/hf/callback_run.py MATERIAL OUT

It keeps one checkpoint, so that a kill in a save has the least to go on from.
"""

import sys
from pathlib import Path

import deepspeed

from tests.hf.trainers import train_with_callback
from tests.numerics.driver import Job, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama

STEPS = 10
PRUNE = {"ratio": 0.4, "prune_every": 2, "cooldown_fraction": 0.3, "channel_multiple": 1}  # cuts after 3, 5 and 7
SAVES = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}


def make_material(folder: Path) -> None:
    """Writes the model and the adapter that all starts begin with."""
    model = make_tiny_llama(
        folder / "model", heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=160, layers=4, vocab=97, seed=1
    )
    write_adapter(folder / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)


def main(material: Path, out: Path) -> None:
    deepspeed.init_distributed("gloo")
    batches = make_batches(steps=STEPS, samples=8, tokens=16, vocab=97, seed=3)
    job = Job(material / "model", material / "adapter", batches, PRUNE, max_grad_norm=0.5)
    train_with_callback(job, out, SAVES, str(out))


if __name__ == "__main__":
    main(*map(Path, sys.argv[-2:]))
