"""Starts DeepSpeed: the process group, then a model that is born sharded in a ZeRO-3 engine, and its training steps."""

import os
from collections import defaultdict
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from loraprune_ds.config_types import Dtype
from loraprune_ds.engine.training import AddLora, Engine, InferenceEngine, TrainingEngine
from loraprune_ds.errors import UserError, first_line
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import differentiate_input, leaf_modules
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.pretrained.pretrained import PretrainedModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import is_cpu
from loraprune_ds.ranks.job import check_local_rank, check_ranks, collective_timeout, gloo_interface
from loraprune_ds.zero.device import accelerator, empty_host_cache, settle_shards
from loraprune_ds.zero.gathering import forget_trace
from loraprune_ds.zero.params import free_shards, shard_at_birth
from loraprune_ds.zero.private import check_private_attributes
from loraprune_ds.zero.releases import decide_releases
from loraprune_ds.zero.shards import NAME

ALONE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


class ShardedEngine(TrainingEngine):
    """Trains a sharded model through `deepspeed`, a `DeepSpeedEngine`."""

    def __init__(self, deepspeed: Any) -> None:
        self.deepspeed = deepspeed
        free = partial(release, deepspeed)
        super().__init__(deepspeed, free, deepspeed.optimizer, deepspeed.lr_scheduler)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        if not last:
            self.deepspeed.step()  # only counts, because this is not a boundary

    def update(self, *, skipped: bool) -> None:
        self.deepspeed.step()
        if skipped:
            # our schedule counts skipped steps, DeepSpeed does not
            self.deepspeed.lr_scheduler.step()
        # orders the updated shards of LoRA before the next forward pass gathers them
        settle_shards()

    def infer(self, **inputs: Any) -> Any:
        """Makes one forward pass in evaluation mode. It does not change what training gathers."""
        # DeepSpeed caches which weights to free after which module. After an evaluation its decisions would make
        # every later step gather weights twice. DeepSpeed caches nothing while it records a pass.
        forget_trace(self.optimizer)
        outputs = super().infer(**inputs)
        forget_trace(self.optimizer)
        return outputs

    def restore_counters(self, step: int, lr_scheduler: JsonObject) -> None:
        super().restore_counters(step, lr_scheduler)
        deepspeed = self.deepspeed
        deepspeed.global_steps = step
        deepspeed.micro_steps = step * deepspeed.gradient_accumulation_steps()
        deepspeed.global_samples = step * deepspeed.train_batch_size()


def release(engine: Any) -> None:
    """Frees the weights and the optimizer's state, even if they are still referenced. The engine is unusable then."""
    # Dropping the engine frees nothing: a global list and a class's cache in DeepSpeed hold every module that ran, and
    # every parameter holds the optimizer.
    engine.empty_partition_cache()
    engine.destroy()  # removes the hooks and waits for the device
    free_shards(engine.module)
    zero = engine.optimizer
    optimizer = vars(zero).get("optimizer")
    if optimizer is not None:  # an engine for inference has none
        optimizer.state.clear()
    vars(zero).clear()  # masters, gradients, buckets and flat copies, under any name
    accelerator().empty_cache()
    empty_host_cache()


class Zero3(Engine):
    """Runs on ranks that each hold a shard of every weight."""

    name = NAME

    def check_device(self, dtype: Dtype) -> None:
        """Raises UserError if DeepSpeed lacks names that we use, or this rank's device does not support `dtype`."""
        check_private_attributes()
        supported = {
            "float16": accelerator().is_fp16_supported,
            "bfloat16": accelerator().is_bf16_supported,
        }
        # a GPU older than Ampere emulates bf16, slower than fp32
        if accelerator().device_name() == "cuda":
            supported["bfloat16"] = partial(torch.cuda.is_bf16_supported, including_emulation=False)
        if dtype in supported and not supported[dtype]():
            device = accelerator().device_name()
            raise UserError(f"model.dtype {dtype} is not supported by the {device} device")

    def start_ranks(self) -> Communicator:
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
        # Keeps CPU ranks from compiling DeepSpeed's shared-memory all-reduce, which only inference uses. It takes half
        # a minute, a compiler and 70 MB of /dev/shm per rank, and leaves a lock that blocks later starts if it is
        # killed.
        deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
        backend = accelerator().communication_backend_name()
        # DeepSpeed makes more groups, for example for hpZ, without a timeout. They get torch's default.
        distributed_c10d.default_pg_timeout = timeout
        distributed_c10d.default_pg_nccl_timeout = timeout  # pyright: ignore[reportPrivateImportUsage]
        try:
            with redirect_stdout(StringIO()):  # drops the lines that DeepSpeed and ninja print
                deepspeed.init_distributed(
                    dist_backend=backend, auto_mpi_discovery=False, timeout=timeout
                )
        except torch.distributed.DistError as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(
                f"the ranks cannot meet at {where} (if another run uses that port, give the launcher "
                f"another --master_port): {first_line(error)}"
            ) from None
        comm = Communicator()
        comm.warm_up()
        return comm

    def build_training_engine(
        self,
        pretrained: PretrainedModel,
        attn_implementation: str,
        dtype: Dtype,
        ds_config: JsonObject,
        add_lora: AddLora,
        max_norm: float,
    ) -> ShardedEngine:
        """Builds the sharded model with LoRA, AdamW and the learning-rate schedule, ready to train. Collective."""
        with redirect_stdout(StringIO()):
            base = build_for_losses(pretrained, attn_implementation)
            shard_at_birth(base, pretrained.weights, ds_config, DTYPES[dtype])
            peft_model, optimizer, lr_scheduler = add_lora(base)
            _gather_as_one(peft_model, pretrained.shape)
            for layers in pretrained.shape.layer_lists:
                differentiate_input(decoder_layers(peft_model)[layers[0]])
            engine, *_ = deepspeed.initialize(
                model=peft_model,
                optimizer=optimizer,
                lr_scheduler=cast(Any, lr_scheduler),
                config=ds_config,
                dist_init_required=False,
            )
        return ShardedEngine(engine)

    def build_inference_engine(
        self,
        pretrained: PretrainedModel,
        attn_implementation: str,
        dtype: Dtype,
        ds_config: JsonObject,
        *,
        head: bool = True,
    ) -> InferenceEngine:
        """Builds the sharded model without an optimizer. Without `head` it returns `final_hidden`. Collective."""
        with redirect_stdout(StringIO()):
            model = build_for_losses(pretrained, attn_implementation, head=head)
            shard_at_birth(model, pretrained.weights, ds_config, DTYPES[dtype])
            _gather_as_one(model, pretrained.shape)
            engine, *_ = deepspeed.initialize(
                model=model, config=ds_config, dist_init_required=False
            )
        decide_releases(cast(Any, engine.optimizer).get_param_coordinator())
        engine.eval()
        return InferenceEngine(engine, partial(release, engine))


def _gather_as_one(model: nn.Module, shape: ModelShape) -> None:
    for layer in decoder_layers(model):
        for module in leaf_modules(layer, shape):
            # ZeRO-3's hooks then run once, not at every module inside
            set_z3_leaf_module(module, True)
