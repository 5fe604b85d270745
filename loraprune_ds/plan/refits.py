"""What refits (`prune.compensate`) cost. A cut repeats the last passes, so nothing is kept between cuts."""

import math
from collections import defaultdict

from loraprune_ds.model.shape import LayerLinear, ModelShape
from loraprune_ds.plan.request import Request, full_bytes
from loraprune_ds.pruning.compensate import measured_linears, numel_sent
from loraprune_ds.pruning.passes import MOST_STEPS, tokens_needed


def refitted(request: Request, shape: ModelShape) -> list[LayerLinear]:
    """Lists the linears that lose inputs, if cuts refit them."""
    layers = request.schedule.limits.open_layers if request.refits else []
    return measured_linears(shape, layers)


def widest_inputs(request: Request, shape: ModelShape) -> int:
    return max((linear.inputs for _, linear in refitted(request, shape)), default=0)


def repeated_tokens(request: Request, shape: ModelShape) -> int:
    """Counts the tokens that a rank repeats: its part of complete steps."""
    needed = tokens_needed(shape, widest_inputs(request, shape))
    tokens_per_step = request.config.train.global_batch_size * request.config.data.window
    steps = min(MOST_STEPS, math.ceil(needed / tokens_per_step))
    return steps * tokens_per_step // request.world_size


def bytes_of_passes(request: Request, shape: ModelShape) -> int:
    """Counts the bytes between two layers: embeddings, hidden states, rotary angles, and masks of packed rows."""
    per_token = 2 * request.element_size * (shape.hidden_size + shape.head_dim)
    if request.config.data.packs_rows:
        per_token += request.config.data.window
    return per_token * repeated_tokens(request, shape)


def _halves(request: Request, shape: ModelShape) -> dict[int, int]:
    """Counts the elements of half of the second moments of each layer."""
    halves: dict[int, int] = defaultdict(int)
    for i, linear in refitted(request, shape):
        halves[i] += numel_sent(linear.inputs)
    return halves


def bytes_of_moments(request: Request, shape: ModelShape) -> int:
    """Counts the most bytes of fp32 moments of passes: of the layer that they are in, and of the layer to solve."""
    of_layer = 4 * max(_halves(request, shape).values(), default=0)
    return of_layer * min(2, request.world_size)


def bytes_in_a_refit(request: Request, before: ModelShape, after: ModelShape) -> int:
    """Counts the most bytes of a refit while it is solved, with the moments of its layer."""
    most = 0
    halves = _halves(request, before)
    linears = zip(refitted(request, before), refitted(request, after), strict=True)
    for (i, linear), (_, smaller) in linears:
        m, n = linear.matrix
        k = smaller.inputs
        moments = 4 * (halves[i] - numel_sent(n) + n * n)
        weights = 2 * request.element_size * m * (n + k)
        lora = 4 * request.config.lora.r * (n + m)
        most = max(most, moments + weights + lora + _bytes_to_solve(n, k, m))
    return most


def _bytes_to_solve(n: int, k: int, m: int) -> int:
    """Counts the most bytes of `refit` in addition to its arguments, with k of n inputs kept and m outputs."""
    right = 4 * (k * k + (n - k) * (k + m) + k * m)
    solution = 8 * k * k + 14 * k * m
    check = 4 * k * k + 12 * k * m
    return max(right, solution, check)


def saved_bytes(request: Request, shape: ModelShape) -> int:
    """Counts the bytes of the linears that were refitted on the way to a shape. Token ids do not count."""
    changed = set(refitted(request, shape)) - set(refitted(request, request.shape))
    return full_bytes(request.stored_as(*(linear for _, linear in changed)))
