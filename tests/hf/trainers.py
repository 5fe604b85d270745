"""Trains with transformers and TRL on real ranks, as their users do, with the callback among the callbacks."""

import logging
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.pruning.importance import LayerScores
from tests.numerics.cutting import recorded_collectives
from tests.numerics.driver import Job, build, gather_everywhere
from tests.unit.shapes_and_scores import repository


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
    """Remembers each step's loss, gradient norm, gathered elements, and the groups that are left after it."""

    def __init__(self, callback: LoraPruneCallback) -> None:
        self.callback, self.rows = callback, list[dict[str, Any]]()
        self._recording = ExitStack()
        self._calls: list[tuple[str, int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._calls = self._recording.enter_context(recorded_collectives())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._recording.close()
        gathered = sum(numel for name, numel in self._calls if name == "all_gather_into_tensor")
        kept = self.callback.pruning.training.pruner.kept_of_dense
        groups = [(keep["heads"].tolist(), keep["channels"].tolist()) for keep in kept]
        self.rows.append({"kept": groups, "gathered": gathered})

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
        learning_rate=job.learning_rate,
        adam_epsilon=job.adam_epsilon,
        lr_scheduler_type="constant",
        max_grad_norm=job.max_grad_norm,
        logging_steps=1,
        bf16=job.dtype == "bfloat16",
        disable_tqdm=True,
        **{"max_steps": len(job.batches), "save_strategy": "no", "report_to": "none", **more},
    )


def load_model(job: Job, **more: Any) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=getattr(torch, job.dtype))
    return PeftModel.from_pretrained(model, job.adapter, is_trainable=True, autocast_adapter_dtype=False, **more)


def stop_early(job: Job, out: Path) -> list[str]:
    """Makes fewer steps than the schedule is made for. Returns the warnings."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("loraprune_ds.hf")
    logger.addHandler(handler)
    try:
        with fresh_accelerate():
            callback = LoraPruneCallback(PruneConfig(**job.prune), steps=20)
            args = arguments(job, out, max_steps=2)
            InOrder(model=load_model(job), args=args, train_dataset=Rows(job), callbacks=[callback]).train()
    finally:
        logger.removeHandler(handler)
    return messages


def cut_gap(scores: LayerScores, before: LayerKeep, after: LayerKeep) -> float:
    """Returns the relative gap between the last group that stays in a layer and the first that goes. 1 if all stay."""
    gaps = [1.0]
    for kind, values in scores.items():
        stays = torch.isin(before[kind], after[kind])
        if not stays.all():
            line = float(values[stays].min())
            gaps.append((line - float(values[~stays].max())) / line)
    return min(gaps)


def train_alone(job: Job) -> list[dict[str, Any]]:
    """Trains with the package's own trainer."""
    trainer = build(job)
    rows = []
    for step in range(1, len(job.batches) + 1):
        record = trainer.step(step)
        before, scores = trainer.pruner.kept_of_dense, trainer.pruner.average.scores or []
        trainer.cut(step)
        kept = [(keep["heads"].tolist(), keep["channels"].tolist()) for keep in trainer.pruner.kept_of_dense]
        gap = min(map(cut_gap, scores, before, trainer.pruner.kept_of_dense))
        rows.append({"loss": record.loss, "norm": record.grad_norm, "kept": kept, "gap": gap})
    return rows


def run_example(script: str, argv: list[str], ids: torch.Tensor) -> torch.Tensor:
    """Runs a script of launch/examples as `__main__`. Returns the live model's logits (samples, tokens, vocabulary)."""
    with fresh_accelerate(), patch.object(sys, "argv", [script, *argv]):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")  # accelerate itself knows no DeepSpeed on CPU ranks and would see one process
        names = runpy.run_path(str(repository() / "launch" / "examples" / script), run_name="__main__")
        engine = names["trainer"].model_wrapped if "trainer" in names else names["model"]
        engine.eval()
        with torch.no_grad():
            return engine(input_ids=ids).logits.float().clone()


def train_with_callback(
    job: Job, out: Path, more: dict[str, Any], checkpoint: str | None = None
) -> tuple[list[Any], dict[str, Any]]:
    """Trains to the end, from the start or from a checkpoint. Returns the rows, and all weights of the model."""
    with fresh_accelerate():
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        watch = Watch(callback)
        trainer = InOrder(
            model=load_model(job),
            args=arguments(job, out, **more),
            train_dataset=Rows(job),
            eval_dataset=Rows(job),
            callbacks=[callback, watch],
        )
        trainer.train(resume_from_checkpoint=checkpoint and callback.resume(trainer.model, checkpoint))
        model = callback.pruning.training.model
        return watch.rows, {name: gather_everywhere(model, p) for name, p in model.module.named_parameters()}


def resume_without_the_callback(job: Job, out: Path, checkpoint: str) -> str:
    """Goes on from a checkpoint without `resume`. Returns the error."""
    with fresh_accelerate():
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        trainer = InOrder(
            model=load_model(job), args=arguments(job, out), train_dataset=Rows(job), callbacks=[callback]
        )
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (UserError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "no error"
