"""Brings one layer, or one tensor, together on the one rank that writes it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn

from loraprune_ds.model.adapters import ADAPTER, lora_linear, lora_weights
from loraprune_ds.model.shapes import LINEARS
from loraprune_ds.zero.params import full_shape
from loraprune_ds.zero.store import Site, WholeLinear

if TYPE_CHECKING:  # the store itself collects what it rewrites
    from loraprune_ds.zero.sharded import ShardedStore


@dataclass(frozen=True)
class CollectedLayer:
    """A whole decoder layer by the names of the checkpoint, relative to the layer."""

    linears: dict[str, WholeLinear]
    others: dict[str, Tensor]  # norms


def collect_layer(store: "ShardedStore", index: int, owner: int) -> CollectedLayer | None:
    """One decoder layer on rank `owner`; None elsewhere. Collective."""
    layer = store.layers[index]
    linears = {linear.name: collect_linear(store, Site(index, linear), owner) for linear in LINEARS}
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    others = {name: collect_tensor(store, layer.get_parameter(name), owner) for name in norms}
    if store.rank != owner:
        return None
    return CollectedLayer(cast(dict[str, WholeLinear], linears), cast(dict[str, Tensor], others))


def collect_linear(store: "ShardedStore", site: Site, owner: int) -> WholeLinear | None:
    """One linear on rank `owner`; None elsewhere. Collective."""
    module = lora_linear(store.layers[site.layer], site.linear)
    base, (a, b) = cast(nn.Linear, module.base_layer), lora_weights(module)
    weight = collect_tensor(store, base.weight, owner)
    bias = None if base.bias is None else collect_tensor(store, base.bias, owner)
    masters = [collect_tensor(store, p, owner, safe_get_local_fp32_param(p)) for p in (a, b)]
    if weight is None:
        return None
    return WholeLinear(weight, bias, *cast(list[Tensor], masters), scaling=module.scaling[ADAPTER])


def collect_ends(store: "ShardedStore", owner: int) -> dict[str, Tensor]:
    """Embedding, final norm and, unless tied, the head on rank `owner`; empty elsewhere. Collective."""
    model = store.engine.module.get_base_model()
    named = {"model.embed_tokens.weight": model.model.embed_tokens.weight, "model.norm.weight": model.model.norm.weight}
    if not store.shape.tie_word_embeddings:
        named["lm_head.weight"] = model.lm_head.weight
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
