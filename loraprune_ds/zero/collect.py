"""Gathers one linear, or one tensor, on the rank that owns its layer."""

from typing import Any, cast

import torch
from deepspeed.utils import safe_get_local_fp32_param
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from loraprune_ds.model.adapters import ADAPTER, lora_weights, plain_parameter
from loraprune_ds.model.frozen import form_of
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.params import full_shape


def collect_linear(module: LoraLinear, owner: int, comm: Communicator) -> CollectedLinear | None:
    """Gathers one linear of a decoder layer on rank `owner`. Returns None elsewhere. Collective."""
    base, (a, b) = cast(nn.Linear, module.base_layer), lora_weights(module)
    form = form_of(base)
    held = {name: collect_tensor(getattr(base, name), owner, comm) for name in form.tensors}
    bias = None if base.bias is None else collect_tensor(base.bias, owner, comm)
    masters = [collect_tensor(p, owner, comm, safe_get_local_fp32_param(p)) for p in (a, b)]
    if comm.rank != owner:
        return None
    whole, factors = cast(dict[str, Tensor], held), cast(list[Tensor], masters)
    return CollectedLinear(whole, bias, *factors, scaling=module.scaling[ADAPTER], form=form)


def collect_others(
    layer: nn.Module, shape: ModelShape, index: int, owner: int, comm: Communicator, trained: bool
) -> dict[str, Tensor]:
    """Gathers what a decoder layer has beside its linears on rank `owner`, by name inside the layer. Collective."""
    names = [*shape.others(index), *(companion.name for companion in shape.companions(index))]
    return _collect_named({name: plain_parameter(layer, name, trained=trained) for name in names}, owner, comm)


def collect_ends(
    causal_lm: nn.Module, shape: ModelShape, owner: int, comm: Communicator, trained: bool
) -> dict[str, Tensor]:
    """Gathers the embedding, the final norm and an untied head on rank `owner`. Empty elsewhere. Collective."""
    named = {name: plain_parameter(causal_lm, name, trained=trained) for name in shape.ends}
    return _collect_named(named, owner, comm)


def _collect_named(named: dict[str, Any], owner: int, comm: Communicator) -> dict[str, Tensor]:
    whole = {name: collect_tensor(parameter, owner, comm) for name, parameter in named.items()}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


@torch.no_grad()
def collect_tensor(parameter: Tensor, owner: int, comm: Communicator, shard: Tensor | None = None) -> Tensor | None:
    """Gathers a whole parameter on rank `owner`. Returns None elsewhere. Collective.

    Args:
        shard: this rank's shard of the parameter's fp32 state. It is gathered instead.
    """
    local = parameter.ds_tensor if shard is None else shard  # type: ignore[attr-defined]
    gathered = comm.gather_to(owner, local.detach().to(comm.device))  # an offloaded shard lies on the host
    if gathered is None:
        return None
    shape = full_shape(parameter)
    return gathered.reshape(-1)[: torch.Size(shape).numel()].view(shape)
