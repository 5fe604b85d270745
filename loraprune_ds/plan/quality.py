"""Costs of the quality settings: `prune.compensate`, `prune.criterion`, `train.distill_weight`.

README.md in this folder has the formulas. A setting that is off costs 0.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.family_row import Linear
from loraprune_ds.model.frozen import Form, Int8
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.activations import PlannedBatch
from loraprune_ds.plan.request import Request
from loraprune_ds.pruning.criterion import DEVICE_BLOCK_NUMEL
from loraprune_ds.pruning.input_moments import measured_linears, numel_sent
from loraprune_ds.zero.flat import layer_owner, partition_numel


def moment_bytes(shape: ModelShape, world_size: int, open_layers: Sequence[int], *, second: bool = True) -> list[int]:
    """Returns the bytes of the fp32 input moments of `prune.compensate`, by rank.

    They belong to o_proj and down_proj of the layers that the rank owns and that may be cut. A moment is a matrix as
    wide as the inputs (`least_squares`). With `second` off it is a vector (`bias`).
    """
    return _by_owner(shape, world_size, open_layers, lambda n: 4 * n * (n if second else 1))


def _by_owner(shape: ModelShape, world_size: int, open_layers: Sequence[int], size: Callable[[int], int]) -> list[int]:
    """Adds up, by rank, the size of what belongs to the n inputs of each linear that may lose some."""
    of_ranks = [0] * world_size
    for i, linear in measured_linears(shape, open_layers):
        of_ranks[layer_owner(i, world_size)] += size(shape.linear_shape(i, linear)[1])
    return of_ranks


def moments_by_rank(request: Request, shape: ModelShape) -> list[int]:
    """Returns the bytes of the input moments, until the last cut."""
    second = request.config.prune.compensate == "least_squares"
    return moment_bytes(shape, request.world_size, _measured_layers(request), second=second)


def _measured_layers(request: Request) -> Sequence[int]:
    """Returns the layers whose inputs are measured."""
    return request.limits.open_layers if request.config.prune.compensate != "none" else ()


def _part_bytes(request: Request, n: int) -> int:
    """Returns the bytes of a rank's part of a moment of n inputs. Of a matrix it is the half that is sent."""
    return 4 * (numel_sent(n) if request.config.prune.compensate == "least_squares" else n)


def measured_inputs(request: Request, shape: ModelShape) -> int:
    """Returns the bytes while a linear is measured: its inputs in fp32, and this rank's part of the moment."""
    prune, train = request.config.prune, request.config.train
    if prune.compensate == "none":
        return 0
    tokens = train.micro_batch_size * request.config.data.window
    widest = max(shape.linear_shape(i, linear)[1] for i, linear in measured_linears(shape))
    return 4 * tokens * widest + _part_bytes(request, widest)


def measuring_sent(request: Request, shape: ModelShape, rank: int | None = None) -> int:
    """Returns the bytes sent per measured step, by `rank` or by the busiest one.

    In every micro-batch a rank sends its parts to the owners of other layers. At the end all ranks add up their tokens
    in one int64.
    """
    part_bytes = partial(_part_bytes, request)
    of_ranks = _by_owner(shape, request.world_size, _measured_layers(request), part_bytes)
    own = min(of_ranks) if rank is None else of_ranks[rank]
    token_count = 8 if request.world_size > 1 and any(of_ranks) else 0
    return request.micro_batches * (sum(of_ranks) - own) + token_count


def measuring_flops(request: Request, shape: ModelShape) -> float:
    """Returns the operations per token of a measured step: half of x·xᵀ of the inputs, or their sum."""
    compensate = request.config.prune.compensate
    if compensate == "none":
        return 0
    widths = [shape.linear_shape(i, linear)[1] for i, linear in measured_linears(shape, request.limits.open_layers)]
    return sum(2 * numel_sent(n) if compensate == "least_squares" else n for n in widths)


def refit_peak(request: Request, before: ModelShape, after: ModelShape) -> int:
    """Returns the most bytes beside the moments while an owner refits a linear."""
    refits = _refits(request, before, after)
    return max((_refit_peak(request, before.form(x), m, n, k) for _, x, m, n, k in refits), default=0)


def refit_sent(request: Request, before: ModelShape, after: ModelShape, rank: int | None = None) -> int:
    """Returns the bytes sent per cut, by `rank` or by the busiest one.

    Ranks send shards to the owners of the layers. An owner sends back the weight or the bias.
    """
    e, r = request.element_size, request.config.lora.r
    sent = [0] * request.world_size
    for owner, linear, m, n, _ in _refits(request, before, after):
        weight = request.held_shards(before.form(linear).held((m, n), e).values())
        bias = e * request.shards([m]) if before.has_bias(linear) else 0
        to_owner = weight + bias + 4 * request.shards([r * n, r * m])
        returned = weight if request.config.prune.compensate == "least_squares" else bias
        sent = [bytes_sent + to_owner for bytes_sent in sent]
        sent[owner] += (request.world_size - 1) * returned - to_owner
    return max(sent) if rank is None else sent[rank]


def refit_flops(request: Request, before: ModelShape, after: ModelShape) -> float:
    """Returns the float64 operations of the busiest rank in a cut.

    They are a Cholesky factor, the right-hand side, its solution, and a check.
    """
    of_ranks = [0.0] * request.world_size
    if request.config.prune.compensate == "least_squares":
        for owner, _, m, n, k in _refits(request, before, after):
            of_ranks[owner] += k**3 / 3 + 2 * k * (n - k) * m + 4 * k**2 * m
    return max(of_ranks)


def squared_gradients(request: Request, shape: ModelShape) -> int:
    """Returns the bytes while `fisher` scores a linear: three fp32 blocks of its inputs.

    A linear's inputs are there anyway. Of a stack of experts dropout replaces them. So they are kept beside, in the
    model's dtype.
    """
    if request.config.prune.criterion != "fisher":
        return 0
    train, layers = request.config.train, range(len(shape.layers))
    tokens = train.micro_batch_size * request.config.data.window
    linear_ids = [shape.input_linear_ids([i]) for i in layers]
    stacks = [sum(shape.inputs_per_token(*x) for x in layer if x.linear.is_stack) for layer in linear_ids]
    kept = request.element_size * tokens * (max(stacks) if train.gradient_checkpointing else sum(stacks))
    widest = max(shape.inputs_per_token(*x) for layer in linear_ids for x in layer)
    blocks = 3 * 4 * min(tokens * widest, DEVICE_BLOCK_NUMEL)
    return blocks + (kept if request.config.lora.lora_dropout else 0)


def linear_sizes(shape: ModelShape) -> list[tuple[int, int]]:
    """Lists (rows, columns) of every linear of the decoder layers."""
    return [shape.linear_shape(i, linear) for i, linear in shape.linear_ids()]


def matrix_sizes(shape: ModelShape) -> list[tuple[int, int]]:
    """Lists (rows, columns) of what is multiplied at once: every linear, or one expert's part of a stack."""
    matrices = [shape.layers[i][linear.kind] if linear.is_stack else 1 for i, linear in shape.linear_ids()]
    return [(rows // n, columns) for n, (rows, columns) in zip(matrices, linear_sizes(shape), strict=True)]


def weight_gradients(request: Request, shape: ModelShape) -> int:
    """Returns the bytes of the true gradient: fp32 shards of all linears."""
    if request.config.prune.criterion != "gradient":
        return 0
    return 4 * request.shards(rows * columns for rows, columns in linear_sizes(shape))


def whole_gradient(request: Request, shape: ModelShape) -> int:
    """Returns the bytes of one linear's whole gradient, its padded form, and this rank's shard, as sent and in fp32."""
    if request.config.prune.criterion != "gradient":
        return 0
    widest, world_size = max(rows * columns for rows, columns in linear_sizes(shape)), request.world_size
    size, e = partition_numel(widest, world_size), _gradient_size(request)
    padded = e * size * (world_size + 1) if world_size > 1 else 0
    return e * widest + padded + (4 * size if e < 4 else 0)


def _gradient_size(request: Request) -> int:
    """Returns the bytes of an element of the true gradient as it is formed. fp16 is too narrow for it."""
    return 4 if request.config.model.dtype == "float16" else request.element_size


def gradient_sent(request: Request, shape: ModelShape) -> int:
    """Returns the bytes sent per step that scores: a reduce-scatter of the true gradient per micro-batch."""
    shards = weight_gradients(request, shape) // 4
    return request.micro_batches * (request.world_size - 1) * shards * _gradient_size(request)


def distilled_logits(request: Request, shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes of a chunk's logits of student and teacher and the target, in fp32.

    A temperature keeps one more tensor: the student's logits at it, beside the others.

    Hidden states before the head, their gradient and the teacher's outputs come on top, for all tokens.
    """
    chunk = chunk_size(shape.vocab_size, request.config.train.loss_chunk_tokens)
    top_k, e = request.config.train.distill_top_k, batch.element_size
    teacher = shape.hidden_size * e if top_k is None else 12 * top_k + 4  # int32 ids become int64
    per_logit = (12 if top_k is None or e < 4 else 8) + (4 if request.config.train.distill_temperature != 1 else 0)
    hidden = 2 * shape.hidden_size * e
    return min(batch.tokens, chunk) * shape.vocab_size * per_logit + batch.tokens * (hidden + teacher)


def _refits(request: Request, before: ModelShape, after: ModelShape) -> Iterator[tuple[int, Linear, int, int, int]]:
    """Yields (owner, linear, outputs, inputs, kept inputs) of every linear that loses inputs."""
    if request.config.prune.compensate == "none":
        return
    for i, linear in measured_linears(before):
        (outputs, inputs), (_, kept) = before.linear_shape(i, linear), after.linear_shape(i, linear)
        if kept < inputs:
            yield layer_owner(i, request.world_size), linear, outputs, inputs, kept


def _refit_peak(request: Request, form: Form, m: int, n: int, k: int) -> int:
    """Returns the most bytes for one linear with m outputs, of whose n inputs k stay."""
    e = request.element_size
    held = sum(x.element_size * math.prod(x.shape) for x in form.held((m, n), e).values())
    gathered = sent = 2 * held  # the shards and one tensor of them; the new weight and its padded form
    whole = held + (e * m * n if isinstance(form, Int8) else 0) + 4 * request.config.lora.r * (n + m)
    if request.config.prune.compensate == "bias":
        return max(gathered, whole + 8 * m * (n - k))
    old_and_new = 2 * e * m * k
    factored = 4 * k * n + 20 * k * k  # the float64 system of the kept inputs and its factor
    right_side = 8 * k * k + 4 * k * n + 12 * (n - k) * (k + m) + 8 * k * m
    solved = 8 * k * k + 24 * k * m + old_and_new
    checked = 12 * k * k + 4 * k * n + 16 * k * m + old_and_new
    return whole + max(factored, right_side, solved, checked, sent)
