"""Brings one linear, or one tensor, together on the one rank that writes it."""

from typing import TYPE_CHECKING, Any, cast

import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from loraprune_ds.model.adapters import ADAPTER, lora_linear, lora_weights
from loraprune_ds.model.shapes import Linear
from loraprune_ds.zero.params import full_shape
from loraprune_ds.zero.store import CollectedLinear

if TYPE_CHECKING:  # the store itself collects what it rewrites
    from loraprune_ds.zero.sharded import ShardedStore

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def collect_linear(store: "ShardedStore", layer: int, linear: Linear, owner: int) -> CollectedLinear | None:
    """One linear of a decoder layer on rank `owner`; None elsewhere. Collective."""
    module = lora_linear(store.layers[layer], linear)
    base, (a, b) = cast(nn.Linear, module.base_layer), lora_weights(module)
    weight = collect_tensor(store, base.weight, owner)
    bias = None if base.bias is None else collect_tensor(store, base.bias, owner)
    masters = [collect_tensor(store, p, owner, safe_get_local_fp32_param(p)) for p in (a, b)]
    if weight is None:
        return None
    return CollectedLinear(weight, bias, *cast(list[Tensor], masters), scaling=module.scaling[ADAPTER])


def collect_norms(store: "ShardedStore", layer: int, owner: int) -> dict[str, Tensor]:
    """A decoder layer's norms by name, relative to the layer, on rank `owner`; empty elsewhere. Collective."""
    named = {name: store.layers[layer].get_parameter(name) for name in NORMS}
    return _collect_named(store, named, owner)


def collect_ends(store: "ShardedStore", owner: int) -> dict[str, Tensor]:
    """Embedding, final norm and, unless tied, the head on rank `owner`; empty elsewhere. Collective."""
    model = store.engine.module.get_base_model()
    named = {"model.embed_tokens.weight": model.model.embed_tokens.weight, "model.norm.weight": model.model.norm.weight}
    if not store.shape.tie_word_embeddings:
        named["lm_head.weight"] = model.lm_head.weight
    return _collect_named(store, named, owner)


def _collect_named(store: "ShardedStore", named: dict[str, Any], owner: int) -> dict[str, Tensor]:
    whole = {name: collect_tensor(store, parameter, owner) for name, parameter in named.items()}
    return {name: tensor for name, tensor in whole.items() if tensor is not None}


@torch.no_grad()
def collect_tensor(store: "ShardedStore", parameter: Tensor, owner: int, piece: Tensor | None = None) -> Tensor | None:
    """A whole parameter (or its fp32 state, given as this rank's `piece`) on rank `owner`; None elsewhere."""
    local = parameter.ds_tensor if piece is None else piece  # type: ignore[attr-defined]
    gathered = store.comm.gather_to(owner, local.detach().to(store.device))  # from the host, if it is offloaded
    if gathered is None:
        return None
    shape = full_shape(parameter)
    return gathered.reshape(-1)[: torch.Size(shape).numel()].view(shape)
