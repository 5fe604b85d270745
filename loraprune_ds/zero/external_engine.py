"""Connects the pruner with the engine of another trainer, and with its PEFT model before there is an engine.

`LiveModel` reads the whole model from the ranks, for an export.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from loraprune_ds.config import Dtype
from loraprune_ds.errors import UserError, require
from loraprune_ds.model.adapters import base_parameter, lora_linear, plain_parameter
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.exported_config import ExportedConfig
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.pretrained import ModelWeights
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owned_range, owner_rounds
from loraprune_ds.ranks.job import Ranks
from loraprune_ds.zero.cut import cut_parameters, parameter_cuts, set_sizes
from loraprune_ds.zero.device import settle_shards
from loraprune_ds.zero.params import collect_linear, collect_named, overwrite_shard, pad
from loraprune_ds.zero.private import check_private_attributes
from loraprune_ds.zero.sharded import ShardedModel

ADAM = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")  # their only state with a shape is exp_avg and exp_avg_sq


def find_zero_optimizer(optimizer: Any) -> DeepSpeedZeroOptimizer_Stage3:
    """Finds DeepSpeed's stage-3 optimizer under the wrappers of accelerate. Raises UserError if there is none."""
    zero = optimizer
    while zero is not None and not isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero = getattr(zero, "optimizer", None)
    if zero is None:
        raise UserError(
            f"pruning needs DeepSpeed ZeRO-3 (zero_optimization.stage 3); the optimizer is {type(optimizer).__name__}"
        )
    return zero


def share_model(module: nn.Module, zero: DeepSpeedZeroOptimizer_Stage3, shape: ModelShape) -> ShardedModel:
    """Wraps a model that another trainer trains, for the pruner. Raises UserError if it cannot be cut."""
    check_private_attributes()
    inner = zero.optimizer
    if type(inner).__name__ not in ADAM or any(group.get("amsgrad") for group in inner.param_groups):
        name = f"{type(inner).__name__}{' with amsgrad' if type(inner).__name__ in ADAM else ''}"
        raise UserError(f"the optimizer state of {name} cannot be cut along with LoRA; use one of {', '.join(ADAM)}")
    shards, ranks = dist.get_world_size(zero.dp_process_group), dist.get_world_size()
    split = f"ZeRO-3 shards over {shards} of {ranks} ranks; tensor and pipeline parallelism cannot be cut"
    require(shards == ranks, split)
    return ShardedModel(module, zero, shape, zero.empty_partition_cache)


def reduced_dtypes(zero: DeepSpeedZeroOptimizer_Stage3) -> set[torch.dtype]:
    """Returns the dtypes in which gradients are sent between ranks and accumulated over micro-batches."""
    return {zero.communication_data_type, zero.gradient_accumulation_dtype}


def gradient_norm(zero: DeepSpeedZeroOptimizer_Stage3) -> float:
    """Returns the norm of all gradients at the last update, before clipping."""
    return float(zero._global_grad_norm)


def before_each_update(zero: DeepSpeedZeroOptimizer_Stage3, action: Callable[[], None]) -> Callable[[], None]:
    """Runs `action` right before each update, on averaged gradients before clipping. Returns an undo."""
    step = zero.step

    def act_and_step(*args: Any, **kwargs: Any) -> Any:
        action()
        result = step(*args, **kwargs)
        settle_shards()  # orders the updated shards of LoRA before the trainer's next forward pass gathers them
        return result

    zero.step = act_and_step
    return partial(setattr, zero, "step", step)


@torch.no_grad()
def cut_without_engine(module: nn.Module, shape: ModelShape, keep: list[LayerKeep]) -> None:
    """Cuts a PEFT model before an engine wraps it. Its base may already be sharded. Collective."""
    comm = Communicator()
    for layer, spec, layer_keep in zip(decoder_layers(module), shape.layers, keep, strict=True):
        cuts = parameter_cuts(layer, spec, layer_keep, comm)
        cut_parameters([(p, plan) for p, plan in cuts if hasattr(p, "ds_tensor")], comm)
        for parameter, plan in cuts:
            if not hasattr(parameter, "ds_tensor"):
                parameter.data = parameter.data.index_select(plan.cut.axis, plan.cut.keep.to(parameter.device))
        if cuts:
            set_sizes(layer, spec.resized(layer_keep.counts))


@torch.no_grad()
def overwrite_weights(module: nn.Module, weights: ModelWeights) -> None:
    """Reads those linears again that `weights` has, before an engine wraps the PEFT model."""
    comm, layers = Communicator(), decoder_layers(module)
    for i, linear in weights.shape.linears():
        name = f"{weights.shape.prefix(i)}{linear.name}"
        if name not in weights.files:
            continue
        parameter: Any = base_parameter(layers[i], linear.name)
        if hasattr(parameter, "ds_tensor"):
            start, end = owned_range(parameter.ds_numel, comm.world_size, comm.rank)
            flat = weights.read_flat(name, start, end, parameter.dtype)
            overwrite_shard(parameter, pad(flat, parameter.ds_numel, comm.world_size))
        else:
            parameter.copy_(weights.read_full(name, parameter.dtype))


class LiveModel:
    """A model that another trainer trains, wherever it came from: a `LayerSource` (export/huggingface.py).

    No rank ever holds more than one layer, or the embedding and head.

    Args:
        dense_folder: has config.json, tokenizer and settings of the dense model.
    """

    tower = None

    def __init__(self, model: ShardedModel, exported: ExportedConfig, dense_folder: Path, dtype: Dtype) -> None:
        self._model, self._dtype = model, DTYPES[dtype]
        self.exported, self.dense_folder = exported, dense_folder

    @property
    def shape(self) -> ModelShape:
        return self._model.shape

    def files(self, ranks: Ranks, *, merge: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields merged layers with the learned copies of PEFT's modules_to_save, others with the initial ones."""
        for indices in owner_rounds(len(self.shape.layers) + 1, ranks.world_size):
            gathered = ((k, self._gather(k, merge)) for k in indices)
            own = [(k, tensors) for k, tensors in gathered if tensors]
            while own:  # the owners of a round work in parallel. None keeps its layer until the next round
                yield own.pop()

    def _gather(self, k: int, merge: bool) -> dict[str, Tensor]:
        """Gathers a layer, or after the last one the parameters outside, on its owner. Empty elsewhere. Collective."""
        model, shape, owner, tensors = self._model, self.shape, self._model.owner(k), dict[str, Tensor]()
        parent, prefix, others = cast(Any, model.module).get_base_model(), "", shape.outer
        if k < len(shape.layers):
            parent, prefix, others = model.layers[k], shape.prefix(k), shape.layers[k].others
            for linear in shape.layers[k].linears:
                collected = collect_linear(lora_linear(parent, linear.linear), owner, model.comm)
                if collected is not None:  # converted before the next linear arrives
                    tensors |= self._convert(f"{prefix}{linear.linear}", collected, merge)
                del collected
        found = collect_named(
            {x.name: plain_parameter(parent, x.name, trained=merge) for x in others}, owner, model.comm
        )
        for tensor in others if found else ():
            value = found[tensor.name]
            tensors[prefix + tensor.name] = value if tensor.keep_fp32 else value.to(self._dtype)
        return tensors

    def _convert(self, name: str, x: CollectedLinear, merge: bool) -> dict[str, Tensor]:
        weight = merge_lora(x.weight, x.lora_A, x.lora_B, x.scaling, self._dtype) if merge else x.weight.to(self._dtype)
        return {f"{name}.weight": weight} | ({} if x.bias is None else {f"{name}.bias": x.bias.to(self._dtype)})
