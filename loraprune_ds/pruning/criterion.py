"""The criteria `lora`, `magnitude` and `fisher`.

`lora` and `magnitude` sum the importance of elements over rows or columns of the shard that a rank owns. `fisher`
records the gradients of masks in the forward and backward passes of training.

Shapes: W (out_features, in_features), A (r, in_features), B (out_features, r); `scaling` s = lora_alpha / r.
"""

# torch does not type every method:
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.model.shape import LayerLinear, LinearId
from loraprune_ds.pruning.layer_scores import second_moments
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard, PrunableModel, hook_inputs

# Elements scored at a time. On a CPU a block and its gradient estimate stay in the cache. On a GPU fewer blocks need
# fewer kernel launches, and the two fp32 copies of a block take 64 MiB.
CPU_BLOCK_NUMEL = 1 << 18
DEVICE_BLOCK_NUMEL = 1 << 23
# elements of inputs at a time, so their fp32 copies and squares stay in a CPU's cache
CPU_INPUTS = 1 << 17

# (rows of W in fp32; their LoRA factors; those rows, if they may be overwritten) -> element importance up to its sign,
# in their shape.
ElementCriterion = Callable[[Tensor, LoraFactors, Tensor | None], Tensor]


def effective_weight(weight: Tensor, factors: LoraFactors, out: Tensor | None = None) -> Tensor:
    """Returns W + s·B·A."""
    return torch.addmm(weight, factors.B, factors.A, alpha=factors.scaling, out=out)


def gradient_estimate(factors: LoraFactors) -> Tensor:
    """Returns G = gB·A + B·gA − gB·gA (LoRAPrune, arXiv 2305.18403, eq. 8): the change of B·A by one unit SGD step."""
    # gB·(A − gA) + B·gA as one product of twice the rank
    return torch.cat([factors.grad_B, factors.B], 1) @ torch.cat(
        [factors.A - factors.grad_A, factors.grad_A]
    )


def lora(weight: Tensor, factors: LoraFactors, out: Tensor | None = None) -> Tensor:
    """Returns G ⊙ (W + s·B·A), signed: the loss's first-order change without an element, as in the released code."""
    return gradient_estimate(factors).mul_(effective_weight(weight, factors, out))


# `fisher` scores masks on inputs, not elements: `MaskGradients`.
ELEMENT_CRITERIA: dict[str, ElementCriterion] = {"lora": lora, "magnitude": effective_weight}


@torch.no_grad()
def score_shard(
    total: Tensor, shard: OwnedShard, factors: LoraFactors, criterion: ElementCriterion, axis: int
) -> None:
    """Adds the importance of the owned elements per row (axis 0) or per column (axis 1) of the full weight to `total`.

    Blocks of rows are scored in fp32 and added up in float64: (out_features,) or (in_features,). Only owned elements
    count in the first and last row, so the sums of the ranks add up to the sums of the weight. A block has rows of one
    expert, because each expert of a stack has separate factors.
    """
    if shard.transposed:
        factors = factors.transposed()
        axis = 1 - axis
    experts = len(factors.A) // factors.B.shape[1]  # a linear that is not a stack counts as one
    rows = shard.shape[0] // experts
    columns = shard.shape[1]
    start = shard.start
    end = start + len(shard.flat)
    block_numel = CPU_BLOCK_NUMEL if shard.flat.device.type == "cpu" else DEVICE_BLOCK_NUMEL
    of_experts = list(zip(factors.A.chunk(experts), factors.grad_A.chunk(experts), strict=True))
    block_rows = max(1, block_numel // columns)
    row = start // columns
    last_row = -(-end // columns)
    while start < end and row < last_row:
        expert = row // rows
        stop = min(row + block_rows, last_row, (expert + 1) * rows)
        # the owned part of these rows
        low = max(start, row * columns)
        high = min(end, stop * columns)
        head = low - row * columns
        tail = stop * columns - high
        owned = shard.flat[low - start : high - start]
        # Zeros fill the first and the last row.
        stored = (pad(owned, (head, tail)) if head or tail else owned).view(-1, columns)
        a, grad_a = of_experts[expert]
        of_rows = LoraFactors(
            a, factors.B[row:stop], grad_a, factors.grad_B[row:stop], factors.scaling
        )
        weight = shard.decode(stored, row)
        importance = criterion(weight, of_rows, None if weight is stored else weight)
        if head or tail:
            flat = importance.view(-1)
            flat[:head] = 0
            flat[len(flat) - tail :] = 0
        part = total[row:stop] if axis == 0 else total
        part += importance.abs_().sum(1 - axis)  # on a CPU a tenth of vector_norm's time
        row = stop


class Tap(torch.autograd.Function):
    """Returns its input. The backward pass calls a receiver with the gradient and with a saved tensor.

    With activation checkpointing the forward runs twice and the backward once, so the receiver is called once.
    """

    @staticmethod
    def forward(
        ctx: Any, passed: Tensor, saved: Tensor, receive: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.receive = receive
        return passed.view_as(passed)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        ctx.receive(gradient, saved)
        return gradient, None, None


class MaskGradients:
    """Records the importance of groups for the criterion `fisher`: the gradient of a mask on their inputs.

    Imagine a mask m_g = 1 on the inputs of o_proj or down_proj that belong to group g. Removing the group sets m_g to
    0. At token t the mask has the gradient

        s_tg = Σ_{j in g} x_tj · ∂L/∂x_tj

    The score is Σ_t s_tg², the diagonal of the mask's empirical Fisher information, up to a factor. It estimates the
    change of the loss (Kwon et al., arXiv 2204.00656, section 4; for heads Michel et al., arXiv 1905.10650), so layers,
    heads and channels compare without norms. LoRA's backward forms ∂L/∂x anyway; W and LoRA are not read. All inputs
    of an expert's last linear belong to the expert, so its mask is on its output, and t are its tokens.

    L is the mean loss over the global batch. Tokens are summed one by one, so the number of ranks and accumulation make
    no difference. A padded position adds nothing, because its gradient is zero.

    Attributes:
        detach: removes the hooks from the model.
    """

    def __init__(self, model: PrunableModel) -> None:
        self._model = model
        self._active = False
        self._squares: dict[LinearId, Tensor] = {}  # of the pass that goes backward
        self._total: Tensor | None = None  # of the passes before
        self.detach = hook_inputs(model, self.linears, self._tap)

    @contextmanager
    def record(self) -> Generator[None]:
        """Records while open, around all passes of a step and the use of the results. Keeps nothing afterwards."""
        self._active = True
        try:
            yield
        finally:
            self._active = False
            self._squares.clear()
            self._total = None

    @property
    def linears(self) -> list[LayerLinear]:
        """The linears that are scored."""
        return self._model.shape.input_linears()

    def sums(self) -> list[Tensor]:
        """Returns this rank's part of the sums over t, float64, for each linear that reads groups (LayerScores)."""
        # The loss was multiplied by the number of ranks, to undo ZeRO-3's average, and in fp16 by a scale.
        scale = self._model.world_size * self._model.loss_scale
        spans = [linear.spans[0] for _, linear in self.linears]
        parts = (self._add_up() / scale**2).split([span.scores for span in spans])
        return [part.view(span.score_shape) for part, span in zip(parts, spans, strict=True)]

    def _tap(
        self, linear_id: LinearId, inputs: Tensor, counts: list[int] | None = None
    ) -> Tensor | None:
        if not self._active:
            return None
        return cast(Tensor, Tap.apply(inputs, inputs, partial(self._receive, linear_id, counts)))

    def _receive(
        self, linear_id: LinearId, counts: list[int] | None, gradient: Tensor, inputs: Tensor
    ) -> None:
        if counts is None:
            span = self._model.shape.linear(linear_id).spans[0]
            s = mask_gradients(inputs, gradient, span.width)
            if span.kind == QUERY_HEADS:
                squares = second_moments(s, span.ranges)
            else:
                squares = sum_of_squares(s)
        else:
            of_experts = zip(inputs.split(counts), gradient.split(counts), strict=True)
            parts = [sum_of_squares(mask_gradients(x, g, x.shape[1])) for x, g in of_experts]
            squares = torch.cat(parts)
        if linear_id in self._squares:  # the pass before is over
            self._total = self._add_up()
            self._squares.clear()
        self._squares[linear_id] = squares

    def _add_up(self) -> Tensor:
        """Returns the sums of this and the earlier passes, flat and in float64."""
        parts = [
            self._squares[key].flatten()
            if (key := LinearId(i, linear.linear)) in self._squares
            else torch.zeros(linear.spans[0].scores, device=self._model.device)
            for i, linear in self.linears
        ]
        sums = torch.cat(parts).double()
        return sums if self._total is None else sums + self._total


def mask_gradients(inputs: Tensor, gradient: Tensor, width: int) -> Iterator[Tensor]:
    """Yields s, (tokens, groups) fp32, for one block of tokens after another. x and ∂L/∂x are (..., groups · width)."""
    inputs = inputs.flatten(0, -2)
    gradient = gradient.flatten(0, -2)
    block_numel = CPU_INPUTS if inputs.device.type == "cpu" else DEVICE_BLOCK_NUMEL
    tokens = max(1, block_numel // inputs.shape[1])
    for x, g in zip(inputs.split(tokens), gradient.split(tokens), strict=True):
        s = x * g.float()  # fp32, also of 16-bit inputs
        if width > 1:
            s = s.unflatten(1, (-1, width)).sum(2)
        yield s


def sum_of_squares(blocks: Iterator[Tensor]) -> Tensor:
    """Returns Σ_t s_tg², (groups,) fp32."""
    squares = next(blocks).square()  # the first block is the longest
    for s in blocks:
        squares[: len(s)].addcmul_(s, s)
    return squares.sum(0)
