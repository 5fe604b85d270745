"""Trains with transformers and TRL on real ranks, as their users do, with the callback among the callbacks."""

import logging
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl.trainer.utils import use_adapter

from loraprune_ds import (
    LoraPruneCallback,
    PruneConfig,
    Pruning,
    linear_names,
    lora_config,
    prepare_model,
)
from loraprune_ds.files import read_json
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.pretrained.adapters import load_adapter
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.ranks.comm import Communicator
from tests.support.cutting import recorded_collectives
from tests.support.driver import Job, build
from tests.support.launching import ROOT
from tests.support.refusals import refused

WITHOUT: dict[str, Any] = {"deepspeed": None}  # arguments of a training without DeepSpeed


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Resets accelerate and transformers in a process that other tests use, too."""
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


class Pairs(Rows):
    """The samples of an encoder-decoder's job, as its users have them."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        first, *_, last = (self.labels[i] != -100).nonzero().flatten().tolist()
        return {
            "source": self.input_ids[i][: first - 1],
            "target": self.labels[i][first : last + 1],
        }


def pad_pairs(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads as transformers' DataCollatorForSeq2Seq does."""
    ids = pad_sequence([item["source"] for item in items], True, 0)
    labels = pad_sequence([item["target"] for item in items], True, -100)
    read = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1].clamp(min=0)], 1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": labels,
        "decoder_input_ids": read,
    }


def loss_of_batch(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None
) -> torch.Tensor:
    """Divides by the tokens of the batch. T5's own loss is the mean over a micro-batch."""
    return (
        cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
        / num_items_in_batch
    )


@dataclass(frozen=True)
class Setup:
    """Describes a user's Trainer apart from the callback.

    Attributes:
        reference: a second adapter `ref`, whose forward pass without a gradient precedes each loss, as in DPO.
        reentrant: how activation checkpointing recomputes. None: there is none.
        fp32_lora: LoRA is in fp32 on a base of less, PEFT's default.
        whole: modules that also train, whole, by PEFT's `modules_to_save`.
        quantised: arguments of BitsAndBytesConfig.
    """

    reference: bool = False
    reentrant: bool | None = None
    fp32_lora: bool = False
    whole: tuple[str, ...] = ()
    quantised: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        if self.reentrant is None:
            return {}
        is_new = hasattr(TrainingArguments, "activation_checkpointing")
        name = "activation_checkpointing" if is_new else "gradient_checkpointing"  # tests/oldest.sh
        return {name: True, f"{name}_kwargs": {"use_reentrant": self.reentrant}}


PLAIN = Setup()


class InOrder(Trainer):
    """Reads the samples in the order of our own trainer's tests. The last loss keeps its graph alive during a cut."""

    def compute_loss(self, *inputs: Any, **more: Any) -> Any:
        self.last_loss = super().compute_loss(*inputs, **more)
        return self.last_loss

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # pyright: ignore[reportArgumentType]


class PairsInOrder(transformers.Seq2SeqTrainer):
    _get_train_sampler = InOrder._get_train_sampler  # pyright: ignore[reportAssignmentType]


def kept_groups(kept: list[LayerKeep]) -> list[tuple[list[int], ...]]:
    return [tuple(groups.tolist() for groups in keep.values()) for keep in kept]


class BesideReference(InOrder):
    """Computes with the adapter `ref` before each loss."""

    def compute_loss(self, model: Any, inputs: Any, *more: Any, **keywords: Any) -> Any:
        with torch.no_grad(), use_adapter(cast(PeftModel, self.model), "ref"):
            model(input_ids=inputs["input_ids"])
        return super().compute_loss(model, inputs, *more, **keywords)


class Watch(TrainerCallback):
    """Remembers each step's loss, gradient norm, rate, gathered elements, and the groups that are left after it."""

    def __init__(self, callback: LoraPruneCallback) -> None:
        self.callback, self.rows = callback, list[dict[str, Any]]()
        self._recording = ExitStack()
        self._calls: list[tuple[str, int]] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._calls = self._recording.enter_context(recorded_collectives())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._recording.close()
        gathered = sum(numel for name, numel in self._calls if name == "all_gather_into_tensor")
        pruning = self.callback.pruning
        kept, tokens = pruning.pruner.kept_of_dense, pruning.recorder.history.steps[-1].tokens
        self.rows.append({"kept": kept_groups(kept), "tokens": tokens, "gathered": gathered})

    def on_log(self, *_: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.rows[-1] |= {
                "loss": logs["loss"],
                "norm": logs["grad_norm"],
                "rate": logs["learning_rate"],
            }


def arguments(job: Job, out: Path, **more: Any) -> TrainingArguments:
    size, world_size = len(job.batches[0][0]), Communicator().world_size
    return transformers.Seq2SeqTrainingArguments(
        output_dir=str(out),
        use_cpu=True,
        per_device_train_batch_size=job.micro_batch_size,
        gradient_accumulation_steps=size // job.micro_batch_size // world_size,
        learning_rate=job.learning_rate,
        adam_epsilon=job.adam_epsilon,
        max_grad_norm=job.max_grad_norm,
        logging_steps=1,
        bf16=job.dtype == "bfloat16",
        disable_tqdm=True,
        **{
            "deepspeed": deepspeed_config(),
            "max_steps": len(job.batches),
            "lr_scheduler_type": "constant",
            "save_strategy": "no",
            "report_to": "none",
            **more,
        },
    )


def deepspeed_config(*, fp32_gradients: bool = True) -> dict[str, Any]:
    """Returns the shipped config, or the part in which gradients travel and add up in the model's dtype."""
    config = read_json(Path("ds_configs/zero3.json"))
    rounded = {"communication_data_type", "data_types"}
    return (
        config
        if fp32_gradients
        else {key: value for key, value in config.items() if key not in rounded}
    )


def load_model(job: Job, setup: Setup = PLAIN) -> PeftModel:
    bits = BitsAndBytesConfig(**setup.quantised) if setup.quantised else None
    model: Any = AutoModelForCausalLM.from_pretrained(
        job.folder, dtype=getattr(torch, job.dtype), quantization_config=bits
    )
    if setup.reentrant is not None:
        model.enable_input_require_grads()
    shape = open_pretrained(job.folder).shape
    if shape.family.has_experts:
        base = prepare_model(model)
        config = lora_config(base, r=job.lora_r, lora_alpha=job.lora_alpha)
        mixture = cast(PeftModel, get_peft_model(base, config, autocast_adapter_dtype=False))
        load_adapter(mixture, job.adapter, shape, job.lora_r)
        return mixture
    if setup.whole:
        torch.manual_seed(job.seed)
        config: Any = LoraConfig.from_pretrained(
            str(job.adapter), modules_to_save=list(setup.whole)
        )
        return cast(
            PeftModel, get_peft_model(model, config, autocast_adapter_dtype=setup.fp32_lora)
        )
    model = PeftModel.from_pretrained(
        model, job.adapter, is_trainable=True, autocast_adapter_dtype=setup.fp32_lora
    )
    if setup.reference:
        model.add_adapter(
            "ref", LoraConfig(r=2, target_modules=linear_names(model.get_base_model()))
        )
    return model


def make_trainer(
    job: Job, args: TrainingArguments, *callbacks: TrainerCallback, setup: Setup = PLAIN
) -> Trainer:
    kind = BesideReference if setup.reference else InOrder
    rows = Rows(job)
    return kind(
        model=load_model(job, setup),
        args=args,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[*callbacks],
    )


def hooked(model: nn.Module) -> list[str]:
    """Names the modules that have a hook of this package."""

    def module_of(hook: Any) -> str:
        # of functools' and torch's wrappers
        inner = getattr(hook, "func", None) or getattr(hook, "hook", hook)
        return inner.__module__

    names: list[str] = []
    for name, module in model.named_modules():
        kinds = [
            value
            for key, value in vars(module).items()
            if key.endswith("_hooks") and isinstance(value, dict)
        ]
        hooks = [hook for kind in kinds for hook in kind.values()]
        names += [name for hook in hooks if module_of(hook).startswith("loraprune_ds")]
    return names


def stop_early(job: Job, out: Path) -> list[str]:
    """Makes fewer steps than the schedule is made for, with gradients in the model's dtype. Returns the warnings."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    with fresh_accelerate(), patch.object(logging.getLogger("loraprune_ds"), "handlers", [handler]):
        callback = LoraPruneCallback(PruneConfig(**job.prune), steps=20)
        args = arguments(job, out, max_steps=2, deepspeed=deepspeed_config(fp32_gradients=False))
        make_trainer(job, args, callback).train()
    return messages


def train_alone(job: Job) -> list[dict[str, Any]]:
    """Trains with the package's own trainer."""
    trainer, rows = build(job), list[dict[str, Any]]()
    for step in range(1, len(job.batches) + 1):
        record = trainer.step(step)
        trainer.cut(step)
        row = {"loss": record.loss, "norm": record.grad_norm, "tokens": record.tokens}
        rows.append(row | {"kept": kept_groups(trainer.pruner.kept_of_dense)})
    return rows


def run_example(
    script: str, argv: list[str], ids: torch.Tensor, deepspeed: bool = True
) -> torch.Tensor:
    """Runs a script of launch/examples as `__main__`. Returns the live model's logits (samples, tokens, vocabulary)."""
    with fresh_accelerate(), patch.object(sys, "argv", [script, *argv]):
        if deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            # accelerate itself knows no DeepSpeed on CPU ranks and would see one process
            PartialState(backend="gloo")
        names = runpy.run_path(str(ROOT / "launch" / "examples" / script), run_name="__main__")
        engine = names["trainer"].model_wrapped if "trainer" in names else names["model"]
        engine.eval()
        with torch.no_grad():
            return engine(input_ids=ids).logits.float().clone()


def train_with_callback(
    job: Job, out: Path, more: dict[str, Any], checkpoint: str | None = None, setup: Setup = PLAIN
) -> tuple[list[Any], dict[str, Any]]:
    """Trains to the end, from the start or from a checkpoint. Returns the rows, and on rank 0 the model's weights."""
    with fresh_accelerate():
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        watch = Watch(callback)
        args = arguments(job, out, **more, **setup.arguments())  # the model is born sharded then
        trainer = make_trainer(job, args, callback, watch, setup=setup)
        trainer.train(
            resume_from_checkpoint=checkpoint and callback.resume(trainer.model, checkpoint)
        )
        assert not hooked(cast(Any, trainer.model))
        if setup.whole:
            callback.save_model(out / "model")
            callback.save_base(out / "base")
        model = callback.pruning.model
        return watch.rows, {
            name: model.collect(p, 0) for name, p in model.module.named_parameters()
        }


def train_pairs_with_callback(job: Job, out: Path, more: dict[str, Any]) -> list[dict[str, Any]]:
    """Trains a T5 to the end, and saves it. Returns the rows."""
    with fresh_accelerate():
        base = prepare_model(transformers.AutoModelForSeq2SeqLM.from_pretrained(job.folder))
        model = PeftModel.from_pretrained(base, job.adapter, is_trainable=True)
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        watch = Watch(callback)
        trainer = PairsInOrder(
            model=model,
            args=arguments(job, out, remove_unused_columns=False, **more),
            train_dataset=Pairs(job),
            data_collator=pad_pairs,
            compute_loss_func=loss_of_batch,
            callbacks=[callback, watch],
        )
        trainer.train()
        callback.save_model(out / "model")
        return watch.rows


def refusal(job: Job, out: Path, setup: Setup, section: str, settings: dict[str, Any]) -> str:
    """Begins a training with more settings in a section of the DeepSpeed config. Returns the error."""
    config = deepspeed_config()
    config[section] = config[section] | settings
    with fresh_accelerate():
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        return refused(
            lambda: make_trainer(
                job, arguments(job, out, deepspeed=config), callback, setup=setup
            ).train()
        )


def refusal_of_compilation(job: Job, out: Path, more: dict[str, Any]) -> str:
    """Begins a training whose model accelerate compiles. Returns the error."""
    with fresh_accelerate(), patch.dict(os.environ, {"ACCELERATE_DYNAMO_BACKEND": "eager"}):
        callback = LoraPruneCallback(PruneConfig(**job.prune))
        return refused(make_trainer(job, arguments(job, out, **more), callback).train)


def cut_a_save_short(job: Job, out: Path, more: dict[str, Any], step: int) -> None:
    """Trains until the Trainer has written `checkpoint-{step}` and the callback writes its part."""
    save = Pruning.save

    def save_or_end(pruning: Pruning, folder: str | Path, *more: Any) -> None:
        if Path(folder).name == f"checkpoint-{step}":
            raise KeyboardInterrupt
        save(pruning, folder, *more)

    with patch.object(Pruning, "save", save_or_end), suppress(KeyboardInterrupt):
        train_with_callback(job, out, more)


def resume_without_the_callback(job: Job, out: Path, more: dict[str, Any], checkpoint: str) -> str:
    """Goes on from a checkpoint without `resume`. Returns the error."""
    with fresh_accelerate():
        trainer = make_trainer(
            job, arguments(job, out, **more), LoraPruneCallback(PruneConfig(**job.prune))
        )
        return refused(trainer.train, resume_from_checkpoint=checkpoint)
