"""Adds LoRA to a frozen model, with its AdamW and the schedule of its learning rate."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import RunConfig, TrainConfig
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import load_adapter


def build_lora(
    shape: ModelShape, config: RunConfig, cycles: Sequence[int], base: Any
) -> tuple[Any, AdamW, LambdaLR]:
    """Adds LoRA to the frozen model, fresh or from `model.adapter`, with its AdamW and learning-rate schedule."""
    train = config.train
    model = add_lora(base, shape, config.lora, config.seed)
    if config.model.adapter:
        load_adapter(model, Path(config.model.adapter).expanduser(), shape, config.lora.r)
    if train.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=train.learning_rate, eps=train.adam_epsilon, weight_decay=0.0)
    lr_scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(train, cycles, step))
    return model, optimizer, lr_scheduler


def learning_rate_factor(config: TrainConfig, cycles: Sequence[int], step: int) -> float:
    """Returns the schedule's factor on the learning rate at a 0-based step.

    It warms up linearly, then stays, or falls to zero linearly or as a cosine. Each of the `cycles`, in steps, has its
    own schedule. Only the first has a warm-up, because Adam's moments exist later.
    """
    steps, *others = cycles
    if others and step >= steps:
        return learning_rate_factor(replace(config, warmup_steps=0), others, step - steps)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return 1 - progress
    if config.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0
