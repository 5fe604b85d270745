"""Bytes of a rank's state between two steps (exact), and of what a pass gathers (a bound)."""

import math
from collections.abc import Iterable, Sequence

from loraprune_ds.model.adapters import WHOLE_LAYER
from loraprune_ds.model.frozen import StoredTensor
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.request import Request
from loraprune_ds.pruning.input_moments import measured_linears
from loraprune_ds.zero.flat import layer_owner
from loraprune_ds.zero.memory import state_terms

Terms = dict[str, int]  # bytes by name


def split_state(
    request: Request, shape: ModelShape, *, stepped: bool = True, measures: bool = False, passed: bool = True
) -> tuple[Terms, Terms]:
    """Returns the terms (on the GPU, in host memory).

    LoRA has moments once it has `stepped`, and hpZ a second copy of the weights once a pass has gathered them.
    """
    size, e, bucket = request.world_size, request.element_size, request.zero["reduce_bucket_size"]
    r, held = request.config.lora.r, request.held(shape)
    terms = state_terms(shape, r, world_size=size, element_size=e, bucket_numel=int(bucket), stepped=stepped)
    if passed and (copies := request.second_copies(held)):
        terms["second_copy"] = copies
    away = ["weights", "lora", "second_copy"] if request.offloads("param") else []
    away += ["lora_masters", "lora_moments", "lora_gradients"] if request.offloads("optimizer") else []
    host = {name: terms.pop(name) for name in list(terms) if name in away}
    blocks = list[int]()  # of page-locked memory, which torch rounds up to powers of two
    if request.offloads("optimizer"):
        host["lora_gradients_for_the_step"] = host["lora_gradients"]  # DeepSpeed's CPU optimizer has its own
        blocks += 2 * [host["lora_gradients"]] if request.offloads("optimizer", pinned=True) else []
    if request.offloads("param", pinned=True):  # frozen shards one by one, LoRA's in a buffer
        second = [request.second_copies([x]) for x in held] if "second_copy" in host else []
        blocks += [host["lora"], *(request.held_shards([x]) for x in held), *second]
    if blocks:
        host["pinned_rounding"] = sum((1 << (block - 1).bit_length()) - block for block in blocks)
    if measures and request.measured_layers:
        terms["input_moments"] = max(moment_bytes(shape, size, request.measured_layers))
    return terms, host


def moment_bytes(shape: ModelShape, world_size: int, open_layers: Sequence[int]) -> list[int]:
    """Returns the bytes of the fp32 input moments of `prune.compensate` by rank, which owns some of the open layers."""
    of_ranks = [0] * world_size
    for i, linear in measured_linears(shape, open_layers):
        of_ranks[layer_owner(i, world_size)] += 4 * shape.linear_shape(i, linear)[1] ** 2
    return of_ranks


def gathered_weights(request: Request, shape: ModelShape, *, trains: bool = True) -> int:
    """Returns the most bytes that a pass gathers at the same time, buffers included."""
    (numel, whole), (layer, largest, linear) = _whole(request, shape), _largest(request, shape)
    if request.world_size == 1 and not request.offloads("param"):
        return linear  # a parameter's data is its only shard
    limits = request.fetch_limits.max_live, request.fetch_limits.prefetch_bucket
    live, prefetched = (round(count * trains * whole / numel) for count in limits)
    if largest > live:  # DeepSpeed fetches nothing ahead of such a module
        live = prefetched = 0
    stays = layer if trains and shape.hidden_size > WHOLE_LAYER else 0
    return min(max(live, stays) + largest + max(largest, prefetched, linear), whole + max(prefetched, linear))


def passes_of_weights(request: Request, shape: ModelShape) -> int:
    """Returns how often a micro-batch gathers the model at most. A model that may stay is not gathered again."""
    stays = _whole(request, shape)[0] <= min(request.fetch_limits.max_live, request.fetch_limits.max_reuse_distance)
    again = request.config.train.gradient_checkpointing and shape.hidden_size > WHOLE_LAYER
    return (1 if stays else 2) + again  # a layer that is gathered whole is there when it is computed again


def held_bytes(held: Iterable[StoredTensor]) -> int:
    """Counts the bytes of unsharded tensors."""
    return sum(x.element_size * math.prod(x.shape) for x in held)


def _whole(request: Request, shape: ModelShape) -> tuple[int, int]:
    """Returns (elements, bytes) of the whole model with LoRA."""
    held, lora = request.held(shape), sum(shape.lora_sizes(request.config.lora.r))
    return sum(math.prod(x.shape) for x in held) + lora, held_bytes(held) + lora * request.element_size


def _largest(request: Request, shape: ModelShape) -> tuple[int, int, int]:
    """Returns the bytes of the largest layer and of the largest module gathered as one, with LoRA, and of a linear
    that is dequantised (0 without int8; one expert of a stack at a time).
    """
    e, r, ends = request.element_size, request.config.lora.r, [math.prod(size) for size in shape.ends.values()]
    one_of_each = list({layer: i for i, layer in enumerate(shape.layers)}.values())
    layer = max(held_bytes(request.held(shape, i)) + e * sum(shape.layer_lora_sizes(i, r)) for i in one_of_each)
    largest, dequantised = e * max(ends), 0
    for i, x in shape.linear_ids(one_of_each):
        size, lora = shape.linear_shape(i, x), sum(map(math.prod, shape.lora_shapes(i, x, r)))
        largest = max(largest, held_bytes(shape.form(x).held(size, e).values()) + e * lora)
        matrices = shape.layers[i][x.kind] if x.is_stack else 1
        dequantised = max(dequantised, shape.int8 * e * math.prod(size) // matrices)
    return layer, max(layer, e * max(ends)) if shape.hidden_size <= WHOLE_LAYER else largest, dequantised
