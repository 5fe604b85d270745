"""The scores of a layer's groups.

For query heads `fisher` keeps a matrix per key-value head; `add_in_turn` turns it into the order of removal. Assume a
set S of the query heads of one key-value head leaves. The loss then changes by about Σ_t (Σ_{h in S} s_th)², where s
are the mask gradients of criterion.py. With M = Σ_t s_t·s_tᵀ this is 1ᵀ·M[S, S]·1.

A set's score is not the sum of its heads' scores: some heads do the same work, and some make up for each other. So M
is recorded, summed over the ranks and averaged over the steps. Its shape is (ranges, q, q) in float64, with a range of
q query heads for each key-value head.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Self

import torch
from torch import Tensor

from loraprune_ds.model.groups import Kind, LayerKeep, LayerTensors
from loraprune_ds.model.shape import ModelShape


class LayerScores(LayerTensors):
    """Holds the importance of a layer's groups, float64: (groups,) for each kind, or second moments of query heads."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerScores":
        return LayerScores((kind, function(scores)) for kind, scores in self.items())

    def select(self, keep: LayerKeep) -> Self:
        selected: dict[Kind, Tensor] = {}
        for kind, scores in self.items():
            kept = keep[kind]
            selected[kind] = scores[kept] if scores.ndim == 1 else select(scores, kept)
        return type(self)(selected)

    def of_groups(self) -> "LayerScores":
        """Returns the scores as (groups,) of each kind."""
        return self.map(lambda scores: add_in_turn(scores) if scores.ndim > 1 else scores)


def flatten(scores: Iterable[LayerScores]) -> Tensor:
    """Copies the scores of all layers into one flat tensor."""
    return torch.cat([values.flatten() for layer in scores for values in layer.values()])


def views(flat: Tensor, like: Sequence[LayerScores]) -> list[LayerScores]:
    """Returns the scores that `flatten` has copied, as views. `like` has their shapes."""
    parts = iter(torch.split(flat, [x.numel() for layer in like for x in layer.values()]))
    return [layer.map(lambda x: next(parts).view(x.shape)) for layer in like]


def random_scores(shape: ModelShape, seed: int) -> list[LayerScores]:
    """Draws one fixed score per group for the criterion `random`, the same on any number of ranks."""
    scores: list[LayerScores] = []
    for i, layer in enumerate(shape.counts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
        draws = {
            kind: torch.rand(count, generator=generator, dtype=torch.float64)
            for kind, count in layer.items()
        }
        scores.append(LayerScores(draws))
    return scores


def second_moments(gradients: Iterable[Tensor], ranges: int) -> Tensor:
    """Returns M. `gradients` are the s of blocks of tokens, (tokens, ranges · q)."""
    blocks = (block.double().view(len(block), ranges, -1) for block in gradients)
    return reduce(torch.add, (torch.einsum("tkg,tkh->kgh", s, s) for s in blocks))


def select(moments: Tensor, keep: Tensor) -> Tensor:
    """Returns M of the heads that stay: ascending indices, of each range the same number."""
    in_range = keep.view(len(moments), -1) % moments.shape[1]  # (ranges, kept)
    rows = moments.take_along_dim(in_range[:, :, None], 1)
    return rows.take_along_dim(in_range[:, None, :], 2)


def add_in_turn(moments: Tensor) -> Tensor:
    """Returns a score for each head, (ranges · q,): the loss it adds to that of the heads that leave before it.

    The head that adds least leaves next; of equal heads the last one leaves. Two heads may make up for each other, but
    no head gets a lower score than one that leaves before it. So the lowest scores leave first.
    """
    scores = torch.empty_like(moments[:, 0])
    infinity = torch.tensor(math.inf)
    for matrix, result in zip(moments, scores, strict=True):
        added = matrix.diagonal().clone()  # (q,), infinite once a head has left
        score = torch.tensor(-math.inf, dtype=matrix.dtype)
        for _ in range(len(matrix)):
            least = len(matrix) - 1 - int(added.flip(0).argmin())
            score = torch.maximum(added[least], score.nextafter(infinity))
            result[least] = score
            added += 2 * matrix[least]
            added[least] = math.inf
    return scores.flatten()
