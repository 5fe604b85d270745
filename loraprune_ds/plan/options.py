"""What the options that buy quality cost: `prune.compensate`, `prune.criterion: gradient`, `train.distill_weight`.

Formulas in README.md in this folder; nothing here is counted for an option that is off.
"""

from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.activations import Batch
from loraprune_ds.plan.request import Request
from loraprune_ds.zero.flat import layer_owner, partition_numel
from loraprune_ds.zero.memory import moment_bytes


def input_moments(request: Request, shape: ModelShape) -> dict[str, int]:
    """Moments of the inputs, on the rank that owns the most, from the first measured step to the last cut."""
    return {"input_moments": max(moments_by_rank(request, shape))} if request.config.prune.compensate != "none" else {}


def measured_inputs(request: Request, shape: ModelShape) -> dict[str, int]:
    """During a measured forward pass: the widest inputs in fp32 and this rank's part of their moment."""
    compensate = request.config.prune.compensate
    if compensate == "none":
        return {}
    tokens = request.config.train.micro_batch_size * request.config.data.window
    widest = _widest_input(shape)
    moment = widest * widest if compensate == "least_squares" else widest
    return {"measured_inputs": 4 * (tokens * widest + moment)}


def refit(request: Request, before: ModelShape, after: ModelShape) -> int:
    """While the widest linear is refitted on its layer's owner, and sent back: bytes on top of its moment.

    A float64 system of the kept inputs and its factor; or the factor with the right-hand side and its solution.
    """
    compensate, e = request.config.prune.compensate, request.element_size
    if compensate == "none":
        return 0
    most = 0
    for i in range(len(before.layers)):
        for linear in before.input_linears:
            out_features, inputs = before.linear_shape(i, linear)
            kept = after.linear_shape(i, linear)[1]
            if kept == inputs:
                continue
            whole = e * out_features * inputs + 4 * request.config.lora.r * (inputs + out_features)
            gathered = 2 * e * out_features * inputs  # the pieces, and one tensor of them
            removed = inputs - kept
            if compensate == "bias":
                most = max(most, gathered, whole + 8 * out_features * removed)
                continue
            factored = 4 * kept * inputs + 20 * kept * kept
            right = 8 * kept * kept + 4 * kept * inputs + 12 * removed * (kept + out_features) + 8 * kept * out_features
            old_and_new = 2 * e * out_features * kept
            solved = 8 * kept * kept + 24 * kept * out_features + old_and_new
            checked = 12 * kept * kept + 4 * kept * inputs + 16 * kept * out_features + old_and_new
            sent = 2 * e * out_features * inputs  # the new weight, and padded to whole pieces
            most = max(most, gathered, whole + max(factored, right, solved, checked, sent))
    return most


def weight_gradients(request: Request, shape: ModelShape) -> dict[str, int]:
    """Of a step that scores by the true gradient: the fp32 pieces of all linears, until they are scored."""
    if request.config.prune.criterion != "gradient":
        return {}
    return {"weight_gradients": 4 * sum(linear_pieces(request, shape))}


def whole_gradient(request: Request, shape: ModelShape) -> dict[str, int]:
    """During its backward pass, besides: one linear's gradient in the model's dtype, in fp32, and padded."""
    if request.config.prune.criterion != "gradient":
        return {}
    widest = max(
        rows * columns
        for rows, columns in (
            shape.linear_shape(i, linear) for i in range(len(shape.layers)) for linear in shape.linears
        )
    )
    world_size = request.cluster.world_size
    padded = 4 * partition_numel(widest, world_size) * (world_size + 1) if world_size > 1 else 0
    copy = request.element_size if request.element_size < 4 else 0
    return {"whole_gradient": (4 + copy) * widest + padded}


def distilled_logits(request: Request, shape: ModelShape, batch: Batch) -> int:
    """In place of the plain loss's: a chunk's logits of student and teacher and the target, in fp32.

    Plus, for all tokens, the hidden states that reach the head, their gradient, and what the teacher is made of.
    """
    chunk = chunk_size(shape.vocab_size, request.config.train.loss_chunk_tokens)
    top_k, e = request.config.train.distill_top_k, batch.element_size
    teacher = shape.hidden_size * e if top_k is None else 12 * top_k + 4  # int32 ids become int64
    per_logit = 12 if top_k is None or e < 4 else 8
    hidden = 2 * shape.hidden_size * e
    return min(batch.tokens, chunk) * shape.vocab_size * per_logit + batch.tokens * (hidden + teacher)


def gradient_bytes(request: Request, shape: ModelShape) -> int:
    """Sent per step that scores by the true gradient: a reduce-scatter of every linear in fp32 per micro-batch."""
    if request.config.prune.criterion != "gradient":
        return 0
    world_size = request.cluster.world_size
    micro_batches = request.config.train.gradient_accumulation_steps(world_size)
    return 4 * micro_batches * (world_size - 1) * sum(linear_pieces(request, shape))


def gradient_flops(request: Request, shape: ModelShape) -> float:
    """Per token of a step that scores by the true gradient: one more product with every linear's inputs."""
    return 2 * shape.linear_numel() if request.config.prune.criterion == "gradient" else 0


def measuring_flops(request: Request, shape: ModelShape) -> float:
    """Per token of a measured step: x·xᵀ of the inputs of o_proj and down_proj, or their sum."""
    compensate = request.config.prune.compensate
    if compensate == "none":
        return 0
    widths = [shape.linear_shape(i, linear)[1] for i in request.limits.open_layers for linear in shape.input_linears]
    return sum(2 * n * n if compensate == "least_squares" else n for n in widths)


def measuring_bytes(request: Request, shape: ModelShape, rank: int | None = None) -> int:
    """Sent per measured step, by a rank or by the one that owns the least: its parts to the other layers' owners."""
    world_size = request.cluster.world_size
    if request.config.prune.compensate == "none" or world_size == 1:
        return 0
    of_ranks = moments_by_rank(request, shape)
    own = min(of_ranks) if rank is None else of_ranks[rank]
    return request.config.train.gradient_accumulation_steps(world_size) * (sum(of_ranks) - own)


def refit_bytes(request: Request, before: ModelShape, after: ModelShape, rank: int | None = None) -> int:
    """Sent per cut, by a rank or by the busiest: pieces to the owners of the layers, and what an owner sends back."""
    world_size, e = request.cluster.world_size, request.element_size
    compensate, r = request.config.prune.compensate, request.config.lora.r
    if compensate == "none" or world_size == 1:
        return 0
    sent = [0] * world_size
    for i in range(len(before.layers)):
        for linear in before.input_linears:
            out_features, inputs = before.linear_shape(i, linear)
            if after.linear_shape(i, linear)[1] == inputs:
                continue
            weight = partition_numel(out_features * inputs, world_size)
            bias = partition_numel(out_features, world_size) if before.has_bias(linear) else 0
            lora = partition_numel(r * inputs, world_size) + partition_numel(r * out_features, world_size)
            owner = layer_owner(i, world_size)
            for other in range(world_size):
                sent[other] += 0 if other == owner else e * (weight + bias) + 4 * lora
            sent[owner] += (world_size - 1) * e * (weight if compensate == "least_squares" else bias)
    return max(sent) if rank is None else sent[rank]


def refit_flops(request: Request, before: ModelShape, after: ModelShape) -> float:
    """Of the busiest rank, in float64: a Cholesky factor of the kept inputs, the right-hand side, its solution, and a
    check of that.
    """
    if request.config.prune.compensate != "least_squares":
        return 0.0
    of_ranks = [0.0] * request.cluster.world_size
    for i in range(len(before.layers)):
        for linear in before.input_linears:
            out_features, inputs = before.linear_shape(i, linear)
            kept = after.linear_shape(i, linear)[1]
            solve = kept**3 / 3 + 2 * kept * (inputs - kept) * out_features + 4 * kept**2 * out_features
            of_ranks[layer_owner(i, len(of_ranks))] += solve if kept < inputs else 0.0
    return max(of_ranks)


def linear_pieces(request: Request, shape: ModelShape) -> list[int]:
    """Elements of this rank's piece of every frozen linear."""
    shapes = [shape.linear_shape(i, linear) for i in range(len(shape.layers)) for linear in shape.linears]
    return [partition_numel(rows * columns, request.cluster.world_size) for rows, columns in shapes]


def moments_by_rank(request: Request, shape: ModelShape) -> list[int]:
    """Bytes of the moments that each rank owns, with `prune.compensate`."""
    second = request.config.prune.compensate == "least_squares"
    return moment_bytes(shape, request.cluster.world_size, request.limits.open_layers, second=second)


def _widest_input(shape: ModelShape) -> int:
    return max(shape.linear_shape(i, linear)[1] for i in range(len(shape.layers)) for linear in shape.input_linears)
