"""The criterion `reap`: how much an expert adds to the tokens that choose it.

    S_e = mean over the tokens t that chose e of  g_e(t) · ‖f_e(t)‖₂

g is the router's weight as the model multiplies it, and f the expert's output before it (REAP, Lasby et al.,
arXiv 2510.13999). It needs no gradient. Heads have no such score: theirs is 0.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor

from loraprune_ds.model.experts import find_experts
from loraprune_ds.pruning.importance import GroupSums
from loraprune_ds.pruning.prunable_model import PrunableModel


class ExpertNorms:
    """Records one step's forward passes. Tokens of all ranks and micro-batches count alike, padding does not."""

    def __init__(self, model: PrunableModel) -> None:
        self._model = model
        self._sums: list[Tensor] = []  # per layer (2, experts) float64: of weighted norms, and of tokens
        self._active = False
        self._attention_mask: Tensor | None = None
        for i, layer in enumerate(model.layers):
            for experts in find_experts(layer):
                experts.observers.append(partial(self._see, i))

    @contextmanager
    def record(self) -> Generator[None]:
        """Starts anew. Open it around all passes of a step and the use of its results."""
        shape, device = self._model.shape, self._model.device
        self._sums = [torch.zeros(2, layer["experts"], dtype=torch.float64, device=device) for layer in shape.layers]
        try:
            yield
        finally:
            self._sums = []

    @contextmanager
    def record_forward(self, attention_mask: Tensor | None) -> Generator[None]:
        """Records one micro-batch. Not to be open in its backward pass, which may run the forward again.

        Args:
            attention_mask: (batch, window) bool, False at padding; None if there is no padding.
        """
        self._active = bool(self._sums)
        self._attention_mask = None if attention_mask is None else attention_mask.to(self._model.device)
        try:
            yield
        finally:
            self._active, self._attention_mask = False, None

    def scores(self, step: int) -> GroupSums:
        """Returns the means over all ranks, by one all-reduce."""
        shape, means = self._model.shape, list[Tensor]()
        totals = self._model.sum_over_ranks(torch.cat([sums.flatten() for sums in self._sums]))
        for both in torch.split(totals, [sums.numel() for sums in self._sums]):
            norms, tokens = both.view(2, -1)
            means.append(norms / tokens.clamp(min=1))
        linear_ids = [linear_id for linear_id in shape.input_linear_ids() if linear_id.linear.is_stack]
        return GroupSums(shape, linear_ids, [means[linear_id.layer] for linear_id in linear_ids], step)

    @torch.no_grad()
    def _see(self, layer: int, outputs: Tensor, weights: Tensor, experts: Tensor, tokens: Tensor) -> None:
        if not self._active:
            return
        norms = cast(Tensor, outputs.double().norm(dim=1)) * weights
        real = torch.ones_like(norms)
        if self._attention_mask is not None:
            real = self._attention_mask.flatten()[tokens].to(norms)
        self._sums[layer].index_add_(1, experts, torch.stack([norms * real, real]))
