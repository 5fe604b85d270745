"""Starts DeepSpeed: the process group, then a model that is born sharded in a ZeRO-3 engine."""

import logging
import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from peft import PeftModel
from torch import nn
from torch.distributed import distributed_c10d
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import Dtype, RunConfig, TrainConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.adapters import add_lora, differentiate_input, gathered_whole, load_adapter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.token_loss import build_for_losses
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import accelerator, is_cpu
from loraprune_ds.zero.environment import check_local_rank, check_ranks, collective_timeout, gloo_interface
from loraprune_ds.zero.params import shard_at_birth
from loraprune_ds.zero.releases import decide_releases
from loraprune_ds.zero.training_engine import TrainingEngine

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def quiet_deepspeed() -> None:
    """Lets DeepSpeed log errors only. By default its logger prints to stdout at INFO."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("deepspeed").setLevel(logging.ERROR)


def start_ranks() -> Communicator:
    """Joins the process group that the launcher described in the environment. Without a launcher it has one rank.

    Raises:
        UserError: the ranks cannot meet, for example because the port is taken. Or the environment describes no rank,
            or this one does not see its device.
    """
    check_ranks(os.environ)
    if "RANK" not in os.environ:
        os.environ |= ALONE
    os.environ.setdefault("LOCAL_RANK", "0")
    timeout = collective_timeout(os.environ)
    os.environ |= gloo_interface(os.environ)
    if not is_cpu():
        check_local_rank(os.environ, accelerator().device_count())
        accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    _skip_shared_memory_op()
    backend = accelerator().communication_backend_name()
    # DeepSpeed makes more groups, for hpZ for example, without a timeout. They have torch's default.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # pyright: ignore[reportPrivateImportUsage]
    try:
        with quiet_stdout():
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    except torch.distributed.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "if another run uses that port, give the launcher a --master_port"
        raise UserError(f"the ranks cannot meet at {where} ({hint}): {str(error).splitlines()[0]}") from None
    comm = Communicator()
    comm.warm_up()
    return comm


def _skip_shared_memory_op() -> None:
    """Keeps CPU ranks from compiling DeepSpeed's shared-memory all-reduce, which only its inference uses.

    That would cost half a minute and a compiler. It would need 70 MB of /dev/shm per rank. Killed midway, it would
    leave a lock that every later start waits for.
    """
    deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)


def stop_ranks() -> None:
    """Leaves the process group, so that gloo's threads are joined before the interpreter exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Drops the lines that DeepSpeed and ninja print while this is open."""
    stdout = sys.stdout
    with open(os.devnull, "w") as sys.stdout:
        try:
            yield
        finally:
            sys.stdout = stdout


def learning_rate_factor(config: TrainConfig, steps: int, step: int) -> float:
    """Returns the schedule's factor on the learning rate at a 0-based step.

    It warms up linearly. Then it stays, or falls to zero linearly or as a cosine. The recovery, the last of `steps`,
    has a schedule of its own. It has no warm-up, for Adam's moments are there already.
    """
    main = steps - config.recovery_steps
    if config.recovery_steps and step >= main:
        recovery = replace(config, warmup_steps=0, recovery_steps=0)
        return learning_rate_factor(recovery, config.recovery_steps, step - main)
    steps = main
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_scheduler == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_scheduler == "cosine" else 1.0


def build_training_engine(
    config: RunConfig, pretrained: PretrainedModel, ds_config: dict[str, Any], steps: int
) -> TrainingEngine:
    """Builds the sharded model with LoRA, AdamW and the learning-rate schedule, ready to train. Collective."""
    with quiet_stdout():
        model = _sharded_base(pretrained, config.model.attn_implementation, config.model.dtype, ds_config)
        peft_model = add_lora(model, pretrained.shape, config.lora, config.seed)
        if config.model.adapter:
            load_adapter(peft_model, Path(config.model.adapter).expanduser(), pretrained.shape, config.lora.r)
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        gather_modules_whole(peft_model, pretrained.shape)
        optimizer = _optimizer(peft_model, config.train)
        schedule: Any = LambdaLR(optimizer, lambda step: learning_rate_factor(config.train, steps, step))
        engine, *_ = deepspeed.initialize(
            model=peft_model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config, dist_init_required=False
        )
    return TrainingEngine(engine, pretrained.shape)


def gather_modules_whole(model: PeftModel, shape: ModelShape) -> None:
    """Has ZeRO-3 gather and free some modules as one. So its hooks run once, not at every module inside."""
    layers = decoder_layers(model)
    for layer in layers:
        for module in gathered_whole(layer, shape):
            set_z3_leaf_module(module, True)
    differentiate_input(layers[0])


def build_inference_engine(
    pretrained: PretrainedModel, attn_implementation: str, dtype: Dtype, ds_config: dict[str, Any]
) -> Any:
    """Builds the plain sharded model in evaluation mode: an engine without an optimizer. Collective."""
    with quiet_stdout():
        model = _sharded_base(pretrained, attn_implementation, dtype, ds_config)
        engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)
    decide_releases(cast(Any, engine.optimizer).get_param_coordinator())
    engine.eval()
    return engine


def _sharded_base(
    pretrained: PretrainedModel, attn_implementation: str, dtype: Dtype, ds_config: dict[str, Any]
) -> Any:
    comm = Communicator()
    model = build_for_losses(pretrained, attn_implementation)
    shard = partial(
        shard_at_birth,
        model,
        pretrained.read_held,
        ds_config=ds_config,
        dtype=DTYPES[dtype],
        world_size=comm.world_size,
        rank=comm.rank,
    )
    comm.all_or_raise(shard)  # a weight that int8 cannot hold is found here, perhaps by one rank alone
    return model


def _optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    return AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        eps=config.adam_epsilon,
        weight_decay=0.0,
    )
