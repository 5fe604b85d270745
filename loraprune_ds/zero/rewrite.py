"""Replaces frozen weights or biases by new ones that are computed whole, each on the owner of its layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.zero.collect import collect_linear
from loraprune_ds.zero.params import overwrite_piece
from loraprune_ds.zero.store import CollectedLinear, Rewrite, Site

if TYPE_CHECKING:  # the store's own method ends here
    from loraprune_ds.zero.sharded import ShardedStore


@torch.no_grad()
def rewrite(store: "ShardedStore", sites: Sequence[Site], what: Literal["weight", "bias"], compute: Rewrite) -> None:
    """Gathers every linear to the owner of its layer, computes, scatters the result to its pieces. Collective.

    W layers at a time, one linear of each, so all owners compute at once and a rank holds one whole linear at most.

    Raises:
        UserError: as `compute` raises it on some rank, on all of them.
    """
    store.engine.empty_partition_cache()
    for sites_of_round in rounds(sites, store.world_size):
        whole: dict[Site, CollectedLinear] = {}
        for site in sites_of_round:
            collected = collect_linear(store, site.layer, site.linear, store.owner(site.layer))
            if collected is not None:
                whole[site] = collected
            del collected  # only `whole` holds it, until the round's results are there
        results = store.comm.together(
            lambda whole=whole: {site: compute(site, linear) for site, linear in whole.items()}
        )
        whole.clear()
        for site in sites_of_round:
            parameter = getattr(cast(nn.Linear, lora_linear(store.layers[site.layer], site.linear).base_layer), what)
            _install(store, parameter, store.owner(site.layer), results.pop(site, None))


def rounds(sites: Sequence[Site], world_size: int) -> list[list[Site]]:
    """Sites of which no two have the same owner, together: one linear of each layer of a round (flat.owner_rounds)."""
    grouped: dict[tuple[int, str], list[Site]] = {}
    for site in sites:
        grouped.setdefault((site.layer // world_size, site.linear.name), []).append(site)
    return list(grouped.values())


def _install(store: "ShardedStore", parameter: Any, owner: int, whole: Tensor | None) -> None:
    flat = None if whole is None else whole.reshape(-1)
    piece = torch.empty_like(parameter.ds_tensor, device=store.device)
    store.comm.scatter_from(owner, flat, piece)
    overwrite_piece(parameter, piece)
