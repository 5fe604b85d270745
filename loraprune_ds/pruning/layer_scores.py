"""The scores of a layer. Those of query heads by `fisher` are second moments, which say the order that they leave in.

A set S of the query heads of one key-value head leaves. The loss then changes by about Σ_t (Σ_{h in S} s_th)², where s
are the mask gradients of criterion.py. With M = Σ_t s_t·s_tᵀ that is 1ᵀ·M[S, S]·1.

The score of a set is not the sum of its heads' scores: some heads do the same, and some make up for each other. M is
recorded instead, summed over the ranks and averaged over the steps.

Its shape is (ranges, q, q), with a range of q query heads for each key-value head. It is float64.
"""

import math
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor

from loraprune_ds.model.groups import LayerKeep, LayerTensors
from loraprune_ds.model.shape import ModelShape


class LayerScores(LayerTensors):
    """Holds the importance of a layer's groups, float64: (groups,) for each kind, or second moments of query heads."""

    def select(self, keep: LayerKeep) -> Self:
        chosen = ((kind, x, keep[kind]) for kind, x in self.items())
        return type(self)(
            (kind, x[kept] if x.ndim == 1 else select(x, kept)) for kind, x, kept in chosen
        )

    def of_groups(self) -> "LayerScores":
        """Returns (groups,) of each kind."""
        return LayerScores((kind, x if x.ndim == 1 else add_in_turn(x)) for kind, x in self.items())


def random_scores(shape: ModelShape, seed: int) -> list[LayerScores]:
    """Draws one fixed score per group for the criterion `random`, the same on any number of ranks."""
    scores: list[LayerScores] = []
    for i, layer in enumerate(shape.counts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        draws = {
            kind: torch.rand(layer[kind], generator=generator, dtype=torch.float64)
            for kind in shape.kinds
        }
        scores.append(LayerScores(draws))
    return scores


def second_moments(gradients: Iterable[Tensor], ranges: int) -> Tensor:
    """Returns M. `gradients` are the s of blocks of tokens, (tokens, ranges · q)."""
    blocks = (s.double().view(len(s), ranges, -1) for s in gradients)
    return torch.stack([torch.einsum("tkg,tkh->kgh", s, s) for s in blocks]).sum(0)


def select(moments: Tensor, keep: Tensor) -> Tensor:
    """Returns M of the heads that stay: ascending indices, of each range the same number."""
    # (ranges, kept), inside their range
    own = keep.view(len(moments), -1).to(moments.device) % moments.shape[1]
    return moments.take_along_dim(own[:, :, None], 1).take_along_dim(own[:, None, :], 2)


def add_in_turn(moments: Tensor) -> Tensor:
    """Returns a score for each head, (ranges · q,): what it adds to the cost of those that leave its range before it.

    The head that adds least leaves next, of equal ones the last. Two heads may make up for each other, but none has a
    lower score than one that leaves before it. So the heads with the lowest scores are those that leave first.
    """
    scores = torch.empty_like(moments[:, 0])
    for own, result in zip(moments, scores, strict=True):
        added, before = own.diagonal().clone(), torch.tensor(-math.inf, dtype=own.dtype)
        for _ in range(len(own)):
            least = len(own) - 1 - int(added.flip(0).argmin())
            before = result[least] = torch.maximum(
                added[least], before.nextafter(torch.tensor(math.inf))
            )
            added += 2 * own[least]
            added[least] = math.inf
    return scores.flatten()
