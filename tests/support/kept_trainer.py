"""Trains with the callback beside the files of tests/kept_steps, where a checkpoint of an earlier version goes on.

To keep one of another version, copy this file out of the checkout and run `PYTHONPATH=CHECKOUT python kept_trainer.py
FOLDER`, where FOLDER is a copy of tests/kept_steps. Keep `FOLDER/trainer/checkpoint-6` without README.md and
training_args.bin.
"""

import contextlib
import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from loraprune_ds import LoraPruneCallback, PruneConfig

WINDOW = 24
PRUNE = {
    "ratio": 0.4,
    "prune_every": 1,
    "warmup_fraction": 0.25,
    "cooldown_fraction": 0.0,
    "channel_multiple": 1,
    "protected_first": 0,
    "protected_last": 0,
}


def train(folder: Path, out: Path) -> tuple[Trainer, LoraPruneCallback]:
    """Trains for eight steps in one process, or goes on from a checkpoint in `out`. Its sixth step is saved."""
    arguments = TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        adam_epsilon=1e-3,
        lr_scheduler_type="linear",
        logging_steps=1,
        save_steps=6,
        report_to="none",
        disable_tqdm=True,
    )
    with contextlib.chdir(folder):
        tokens = AutoTokenizer.from_pretrained("source")(Path("text.txt").read_text())["input_ids"]
        model = AutoModelForCausalLM.from_pretrained("source")
    rows = [tokens[i : i + WINDOW] for i in range(0, len(tokens) - WINDOW, WINDOW)]
    set_seed(1)
    pruning = LoraPruneCallback(PruneConfig(**PRUNE))
    trainer = Trainer(
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # pyright: ignore[reportArgumentType]
        callbacks=[pruning],
    )
    trainer.train(resume_from_checkpoint=pruning.resume(trainer.model))
    return trainer, pruning


if __name__ == "__main__":
    kept = Path(sys.argv[1])
    train(kept, kept / "trainer")
