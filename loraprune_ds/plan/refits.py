"""What refits (`prune.compensate`) cost: memory, bytes sent, operations and bytes of a checkpoint."""

from loraprune_ds.model.shape import LayerLinear, ModelShape
from loraprune_ds.plan.request import Request, full_bytes
from loraprune_ds.pruning.compensate import measured_linears, numel_sent
from loraprune_ds.ranks.flat import layer_owner


def refitted(request: Request, shape: ModelShape) -> list[LayerLinear]:
    """Lists the linears that lose inputs, if cuts refit them."""
    layers = request.schedule.limits.open_layers if request.refits else []
    return measured_linears(shape, layers)


def _halves(request: Request, shape: ModelShape) -> int:
    """Counts the elements of half the second moments of their inputs."""
    return sum(numel_sent(linear.inputs) for _, linear in refitted(request, shape))


def bytes_between_steps(request: Request, shape: ModelShape) -> int:
    """Counts the bytes of the fp32 moments on the rank that owns most."""
    return max(moment_bytes(refitted(request, shape), request.world_size))


def moment_bytes(linears: list[LayerLinear], world_size: int) -> list[int]:
    """Returns the bytes of these linears' moments on each rank, which has those of its own layers."""
    by_rank = [0] * world_size
    for i, linear in linears:
        by_rank[layer_owner(i, world_size)] += 4 * linear.inputs**2
    return by_rank


def bytes_in_a_pass(request: Request, shape: ModelShape) -> int:
    """Counts the bytes of the inputs that a micro-batch adds, and of half a moment."""
    widest = max((linear.inputs for _, linear in refitted(request, shape)), default=0)
    return 4 * (request.training_batch.tokens * widest + numel_sent(widest))


def bytes_in_a_cut(request: Request, before: ModelShape, after: ModelShape) -> int:
    """Counts the most bytes of a refit while it is solved."""
    most = 0
    linears = zip(refitted(request, before), refitted(request, after), strict=True)
    for (_, linear), (_, smaller) in linears:
        m, n = linear.matrix
        k = smaller.inputs
        weights = 2 * request.element_size * m * (n + k)
        lora = 4 * request.config.lora.r * (n + m)
        most = max(most, weights + lora + _bytes_to_solve(n, k, m))
    return most


def _bytes_to_solve(n: int, k: int, m: int) -> int:
    """Counts the most bytes of `refit` in addition to its arguments, with k of n inputs kept and m outputs."""
    system = 20 * k * k + 4 * k * n
    right = 8 * k * k + 4 * k * n + 12 * (n - k) * (k + m) + 8 * k * m
    solution = 8 * k * k + 24 * k * m
    check = 12 * k * k + 4 * k * n + 16 * k * m
    return max(system, right, solution, check)


def sent_in_a_step(request: Request, shape: ModelShape) -> int:
    """Counts the bytes that a rank sends in a step that measures: half of each moment per micro-batch."""
    moments = _halves(request, shape)
    if request.world_size == 1 or not moments:
        return 0
    return 8 + 4 * request.micro_batches * moments


def sent_in_a_cut(request: Request, before: ModelShape, layers: list[int]) -> int:
    """Counts the bytes of the linears that lose inputs in these layers, to the owner and back."""
    linears = [linear for i, linear in refitted(request, before) if i in layers]
    return 2 * full_bytes(request.stored_as(*linears))


def flops_per_token(request: Request, shape: ModelShape) -> int:
    """Counts the operations of a step that measures, per token."""
    return 2 * _halves(request, shape)


def saved_bytes(request: Request, shape: ModelShape) -> int:
    """Counts the bytes of a checkpoint at a shape: the linears refitted by then, and half of the moments."""
    changed = set(refitted(request, shape)) - set(refitted(request, request.shape))
    linears = full_bytes(request.stored_as(*(linear for _, linear in changed)))
    cuts_before = 0 if shape is request.shape else 1
    if len(request.schedule.cut_steps) <= cuts_before:
        return linears  # no cut will need the moments
    return linears + 4 * _halves(request, shape)
