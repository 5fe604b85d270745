"""Transcribes the criteria in fp64 from their papers in the most literal way, with loops.

It shares no code with the package. LoRAPrune's (arXiv 2305.18403) has the product form of the gradient estimate, not
its expansion.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# W (out, in), A (r, in), B (out, r), gA (r, in), gB (out, r)
LoraLinear = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def gradient_estimate(A: Tensor, B: Tensor, gA: Tensor, gB: Tensor) -> Tensor:
    """Computes what one SGD step of size 1 on A and B takes away from B·A: (out, in)."""
    A, B, gA, gB = A.double(), B.double(), gA.double(), gB.double()
    return B @ A - (B - gB) @ (A - gA)


def element_importance(
    W: Tensor, A: Tensor, B: Tensor, gA: Tensor, gB: Tensor, scaling: float
) -> Tensor:
    """Computes |G ⊙ (W + s·B·A)|, (out, in), as the paper's released code. Its text squares this."""
    merged = W.double() + scaling * (B.double() @ A.double())
    return (gradient_estimate(A, B, gA, gB) * merged).abs()


def group_scores(
    layer: Mapping[str, LoraLinear],
    scaling: float,
    num_key_value_heads: int,
    queries_per_group: int,
    head_dim: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Returns (heads (num_key_value_heads,), channels (intermediate_size,)) of one decoder layer.

    `layer` maps "self_attn.q_proj" … "mlp.down_proj" to their tensors. A head group is a key-value head: its rows of k
    and v, its query heads' rows of q and columns of o. A channel is its rows of gate and up and its column of down.
    `normalize` gives each module's scores unit L2 norm before they are added.
    """
    element = {name: element_importance(*tensors, scaling) for name, tensors in layer.items()}

    q, k, v, o = (torch.zeros(num_key_value_heads, dtype=torch.float64) for _ in range(4))
    for group in range(num_key_value_heads):
        for row in range(group * head_dim, (group + 1) * head_dim):
            k[group] += element["self_attn.k_proj"][row, :].sum()
            v[group] += element["self_attn.v_proj"][row, :].sum()
        for query_head in range(group * queries_per_group, (group + 1) * queries_per_group):
            for position in range(query_head * head_dim, (query_head + 1) * head_dim):
                q[group] += element["self_attn.q_proj"][position, :].sum()
                o[group] += element["self_attn.o_proj"][:, position].sum()

    num_channels = element["mlp.gate_proj"].shape[0]
    gate, up, down = (torch.zeros(num_channels, dtype=torch.float64) for _ in range(3))
    for channel in range(num_channels):
        gate[channel] += element["mlp.gate_proj"][channel, :].sum()
        up[channel] += element["mlp.up_proj"][channel, :].sum()
        down[channel] += element["mlp.down_proj"][:, channel].sum()

    if normalize:
        q, k, v, o, gate, up, down = (_unit_norm(scores) for scores in (q, k, v, o, gate, up, down))
    return q + k + v + o, gate + up + down


def _unit_norm(scores: Tensor) -> Tensor:
    norm = math.sqrt(sum(float(score) ** 2 for score in scores))
    return scores if norm == 0 else scores / norm


def moving_average(old: Tensor, new: Tensor, lam: float) -> Tensor:
    """Computes S ← lam·S + (1 − lam)·S_now. The first `old` is zeros."""
    return lam * old + (1 - lam) * new


def cubic_target(
    step: int, steps: int, ratio: float, warmup_fraction: float, cooldown_fraction: float
) -> float:
    """Computes the fraction to be gone after `step`: 0 in the warm-up, `ratio` in the cool-down, unrounded borders."""
    first, last = warmup_fraction * steps, steps - cooldown_fraction * steps
    if step <= first:
        return 0.0
    if step >= last:
        return ratio
    return ratio * (1 - (1 - (step - first) / (last - first)) ** 3)


def keep_best(scores: Tensor, count: int) -> list[int]:
    """Returns indices, ascending, of the `count` highest scores. Of equal ones the lower index is kept."""
    values = scores.tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def cut_gap(scores: Tensor, count: int) -> float:
    """Computes the distance of the lowest kept and the highest removed score, relative to the kept one."""
    ordered = sorted(scores.tolist(), reverse=True)
    if count <= 0 or count >= len(ordered):
        return math.inf
    return (ordered[count - 1] - ordered[count]) / ordered[count - 1]


# `fisher` by a mask that a dense model really multiplies its inputs by: Kwon et al., arXiv 2204.00656


def mask_fisher(
    loss: Callable[[], Tensor], masked: Sequence[tuple[nn.Module, int, int]]
) -> list[Tensor]:
    """Returns Σ over tokens of (∂loss/∂mask)², (groups,) float64 of each masked module, by one mask per token.

    Of query heads it returns the second moments of each range, (ranges, q, q).

    Args:
        loss: makes one forward pass of the whole batch, which calls the masked modules in the order given.
        masked: modules, the groups that their inputs consist of, and the ranges if these are query heads, else 0.
    """
    masks: list[Tensor] = []

    def multiply(groups: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        samples, tokens, width = inputs[0].shape
        masks.append(torch.ones(samples, tokens, groups, dtype=inputs[0].dtype, requires_grad=True))
        return inputs[0] * masks[-1].repeat_interleave(width // groups, 2), *inputs[1:]

    handles = [
        module.register_forward_pre_hook(partial(multiply, groups)) for module, groups, _ in masked
    ]
    gradients = torch.autograd.grad(loss(), masks)
    for handle in handles:
        handle.remove()
    sizes = ((ranges or groups, -1) for _, groups, ranges in masked)
    s = [
        gradient.double().flatten(0, 1).unflatten(1, x)
        for gradient, x in zip(gradients, sizes, strict=True)
    ]
    moments = [torch.einsum("tkg,tkh->kgh", x, x) for x in s]
    return [x if x.shape[1] > 1 else x.flatten() for x in moments]
