"""Trains with transformers and TRL on real ranks, as their users do, with the callback among the callbacks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from loraprune_ds.config import PruneConfig
from loraprune_ds.files import read_json
from loraprune_ds.hf.callback import LoraPruneCallback
from tests.numerics.driver import Job, build


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Lets accelerate and transformers begin anew in a process that other tests use, too."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)


class Rows(Dataset):
    """The samples of a job."""

    def __init__(self, job: Job) -> None:
        self.input_ids, self.labels = (torch.cat(parts) for parts in zip(*job.batches, strict=True))

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = self.input_ids[i]
        return {"input_ids": ids, "labels": self.labels[i], "attention_mask": torch.ones_like(ids)}


class InOrder(Trainer):
    """Reads the samples in the order of our own trainer's tests."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]


class Watch(TrainerCallback):
    """Remembers each step's loss, gradient norm, and the groups that are left after it."""

    def __init__(self, callback: LoraPruneCallback) -> None:
        self.callback, self.rows = callback, list[dict[str, Any]]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        kept = self.callback.pruning.training.pruner.kept_of_dense
        self.rows.append({"kept": [(keep["heads"].tolist(), keep["channels"].tolist()) for keep in kept]})

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.rows[-1] |= {"loss": logs["loss"], "norm": logs["grad_norm"]}


def arguments(job: Job, out: Path, **more: Any) -> TrainingArguments:
    size, world_size = len(job.batches[0][0]), torch.distributed.get_world_size()
    return TrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        deepspeed=read_json(Path("ds_configs/zero3.json")),
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=size // job.micro_batch_size // world_size,
        max_steps=len(job.batches),
        learning_rate=job.learning_rate,
        adam_epsilon=job.adam_epsilon,
        lr_scheduler_type="constant",
        max_grad_norm=job.max_grad_norm,
        logging_steps=1,
        bf16=job.dtype == "bfloat16",
        disable_tqdm=True,
        **{"save_strategy": "no", "report_to": "none", **more},
    )


def load_model(job: Job, **more: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype))
    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=False, **more)


def train_with_callback(job: Job, out: Path, more: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    with fresh_accelerate():
        args = arguments(job, out, **(more or {}))
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        watch = Watch(callback)
        trainer = InOrder(model=load_model(job), args=args, train_dataset=Rows(job), callbacks=[callback, watch])
        trainer.train()
        return watch.rows


def train_alone(job: Job) -> list[dict[str, Any]]:
    """Trains with the package's own trainer."""
    trainer = build(job)
    rows = []
    for step in range(1, len(job.batches) + 1):
        record = trainer.step(step)
        trainer.cut(step)
        kept = [(keep["heads"].tolist(), keep["channels"].tolist()) for keep in trainer.pruner.kept_of_dense]
        rows.append({"loss": record.loss, "norm": record.grad_norm, "kept": kept})
    return rows
