"""Starts DeepSpeed: the process group, then a model that is born sharded in a ZeRO-3 engine, and its training steps."""

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from loraprune_ds.config import Dtype, RunConfig, TrainConfig
from loraprune_ds.errors import UserError, first_line
from loraprune_ds.model.adapters import add_lora, differentiate_input, leaf_modules, load_adapter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.token_loss import build_for_losses
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import is_cpu
from loraprune_ds.ranks.job import check_local_rank, check_ranks, collective_timeout, gloo_interface
from loraprune_ds.zero.device import accelerator, empty_host_cache, settle_shards
from loraprune_ds.zero.params import free_shards, shard_at_birth
from loraprune_ds.zero.private import LOSS_SCALE_FIELDS
from loraprune_ds.zero.releases import decide_releases
from loraprune_ds.zero.sharded import ShardedModel

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def start_ranks() -> Communicator:
    """Joins the process group of the launcher's environment. Without a launcher it has one rank.

    Raises:
        UserError: the ranks cannot meet, the environment describes no rank, or this rank does not see its device.
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
    # Keeps CPU ranks from compiling DeepSpeed's shared-memory all-reduce, which only inference uses. It takes half a
    # minute, a compiler and 70 MB of /dev/shm per rank, and leaves a lock that blocks later starts if it is killed.
    deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    backend = accelerator().communication_backend_name()
    # DeepSpeed makes more groups, for example for hpZ, without a timeout. They get torch's default.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # pyright: ignore[reportPrivateImportUsage]
    try:
        with redirect_stdout(StringIO()):  # drops the lines that DeepSpeed and ninja print
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    except torch.distributed.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "if another run uses that port, give the launcher another --master_port"
        raise UserError(f"the ranks cannot meet at {where} ({hint}): {first_line(error)}") from None
    comm = Communicator()
    comm.warm_up()
    return comm


class TrainingEngine:
    """Trains the sharded `model` through `deepspeed`, a `DeepSpeedEngine`. Every method is collective."""

    def __init__(self, deepspeed: Any, shape: ModelShape) -> None:
        self.deepspeed = deepspeed
        self.model = ShardedModel(deepspeed.module, deepspeed.optimizer, shape, deepspeed.empty_partition_cache)

    @property
    def learning_rate(self) -> float:
        return float(self.deepspeed.get_lr()[0])

    def forward(self, **inputs: Any) -> Any:
        return self.deepspeed(**inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch, averaged over the ranks. `loss`: its share of the step's loss."""
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def end_micro_batch(self) -> None:
        """Counts a micro-batch. Call it after every micro-batch of a step except the last."""
        self.deepspeed.step()  # only counts, because this is not a boundary

    def update(self, *, skipped: bool) -> float | None:
        """Makes the update, unless fp16 has `skipped` it. Returns the gradient norm before clipping, or None."""
        optimizer_step(self.deepspeed, skipped=skipped)
        settle_shards()  # orders the updated shards of LoRA before the next forward pass gathers them
        norm = None if skipped else self.deepspeed.get_global_grad_norm()
        return None if norm is None else float(norm)

    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode. It does not change what training gathers."""
        # DeepSpeed caches which weights to free after which module. After an evaluation its decisions would make
        # every later step gather weights twice. DeepSpeed caches nothing while it records a pass.
        self.model.forget_trace()
        self.deepspeed.eval()
        with torch.no_grad():
            outputs = self.deepspeed(**inputs)
        self.deepspeed.train()
        self.model.forget_trace()
        return outputs

    def counters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the states of the learning-rate schedule and of fp16's loss scaler, both for JSON."""
        scaler = self.deepspeed.optimizer.loss_scaler
        loss_scale = {name: getattr(scaler, name) for name in LOSS_SCALE_FIELDS if scaler.dynamic}
        return self.deepspeed.lr_scheduler.state_dict(), loss_scale

    def restore_counters(self, step: int, schedule: dict[str, Any], loss_scale: dict[str, Any]) -> None:
        """Restores the schedule, the loss scale and DeepSpeed's step counts."""
        deepspeed = self.deepspeed
        deepspeed.lr_scheduler.load_state_dict(schedule)
        for group, rate in zip(deepspeed.optimizer.param_groups, deepspeed.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        for name, value in loss_scale.items():
            setattr(deepspeed.optimizer.loss_scaler, name, value)
        deepspeed.global_steps = step
        deepspeed.micro_steps = step * deepspeed.gradient_accumulation_steps()
        deepspeed.global_samples = step * deepspeed.train_batch_size()


def optimizer_step(engine: Any, *, skipped: bool) -> None:
    """Makes the update and sets the next learning rate. The schedule counts skipped steps, DeepSpeed does not."""
    engine.step()
    if skipped:
        engine.lr_scheduler.step()


def release(engine: Any) -> None:
    """Frees the weights and the optimizer's state, even if they are still referenced. The engine is unusable then."""
    # Dropping the engine frees nothing: a global list and a class's cache in DeepSpeed hold every module that ran, and
    # every parameter holds the optimizer.
    engine.empty_partition_cache()
    engine.destroy()  # removes the hooks and waits for the device
    free_shards(engine.module)
    zero = engine.optimizer
    if inner := vars(zero).get("optimizer"):  # an engine for inference has none
        inner.state.clear()
    vars(zero).clear()  # masters, gradients, buckets and flat copies, under any name
    accelerator().empty_cache()
    empty_host_cache()


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
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_scheduler == "cosine" else 1.0


def build_training_engine(
    pretrained: PretrainedModel, ds_config: dict[str, Any], cycles: Sequence[int], config: RunConfig
) -> TrainingEngine:
    """Builds the sharded model with LoRA, AdamW and the learning-rate schedule, ready to train. Collective."""
    model, lora, train = config.model, config.lora, config.train
    with redirect_stdout(StringIO()):
        base = _sharded_base(pretrained, model.attn_implementation, model.dtype, ds_config)
        peft_model = add_lora(base, pretrained.shape, lora, config.seed)
        if model.adapter:
            load_adapter(peft_model, Path(model.adapter).expanduser(), pretrained.shape, lora.r)
        if train.gradient_checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _gather_as_one(peft_model, pretrained.shape)
        for layers in pretrained.shape.layer_lists:
            differentiate_input(decoder_layers(peft_model)[layers[0]])
        trainable = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = AdamW(trainable, lr=train.learning_rate, eps=train.adam_epsilon, weight_decay=0.0)
        schedule: Any = LambdaLR(optimizer, lambda step: learning_rate_factor(train, cycles, step))
        engine, *_ = deepspeed.initialize(
            model=peft_model, optimizer=optimizer, lr_scheduler=schedule, config=ds_config, dist_init_required=False
        )
    return TrainingEngine(engine, pretrained.shape)


def build_inference_engine(
    pretrained: PretrainedModel, attn_implementation: str, dtype: Dtype, ds_config: dict[str, Any], *, head: bool = True
) -> Any:
    """Builds the sharded model without an optimizer. Without `head` it returns `final_hidden`. Collective."""
    with redirect_stdout(StringIO()):
        model = _sharded_base(pretrained, attn_implementation, dtype, ds_config, head=head)
        _gather_as_one(model, pretrained.shape)
        engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)
    decide_releases(cast(Any, engine.optimizer).get_param_coordinator())
    engine.eval()
    return engine


def _gather_as_one(model: nn.Module, shape: ModelShape) -> None:
    for module in chain.from_iterable(leaf_modules(layer, shape) for layer in decoder_layers(model)):
        set_z3_leaf_module(module, True)  # ZeRO-3's hooks then run once, not at every module inside


def _sharded_base(
    pretrained: PretrainedModel, attn_implementation: str, dtype: Dtype, ds_config: dict[str, Any], *, head: bool = True
) -> Any:
    comm = Communicator()
    model: Any = build_for_losses(pretrained, attn_implementation)
    if not head:
        model.lm_head = None
    # One rank alone may find a weight that int8 cannot hold.
    comm.all_or_raise(lambda: shard_at_birth(model, pretrained.weights.read_stored, ds_config, DTYPES[dtype], comm))
    return model
