"""Chooses whole layers to drop: those that change the hidden states least."""

# torch does not type every method:
# pyright: reportUnknownMemberType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.taps import ForwardRecorder


class BlockInfluence(ForwardRecorder):
    """Keeps a moving average of each layer's influence, the mean of 1 − cos(h_in, h_out) over the tokens of a step.

    ShortGPT (Men et al., arXiv 2403.03853, section 2.2). Padded positions do not count.
    """

    def __init__(self, model: PrunableModel, decay: float) -> None:
        super().__init__()
        self.average: Tensor | None = None  # (layers,) float64 in host memory. None: nothing was recorded yet
        self._model, self._decay = model, decay
        self._sums = torch.zeros(len(model.layers) + 1, dtype=torch.float64, device=model.device)  # the last: tokens
        for i in model.shape.present:
            model.layers[i].register_forward_hook(partial(self._see, i), with_kwargs=True)

    @contextmanager
    def record_step(self) -> Generator[None]:
        """Records the forward passes of a step inside `record_forward`. Collective at its end."""
        self._sums.zero_()
        yield
        *sums, tokens = self._model.sum_over_ranks(self._sums.clone()).cpu()
        now = torch.stack(sums) / tokens.clamp(min=1)
        old = torch.zeros_like(now) if self.average is None else self.average
        self.average = self._decay * old + (1 - self._decay) * now

    @torch.no_grad()
    def _see(self, i: int, layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if not self._active:
            return
        before: Tensor = args[0] if args else named["hidden_states"]
        after = cast(Tensor, output[0] if isinstance(output, tuple) else output)
        change = self._of_tokens(1 - cosine_similarity(before.float(), after.float(), dim=-1))
        self._sums[i] += change.sum(dtype=torch.float64)
        if i == 0:  # this layer is never dropped
            self._sums[-1] += change.numel()


def least_influential(influence: Tensor, droppable: Sequence[int], shape: ModelShape) -> int:
    """Returns the droppable layer with the least influence, in a tie the first one."""
    return min(set(droppable) & set(shape.present), key=lambda i: (float(influence[i]), i))
