"""Bytes of a rank's state between two steps, and of a checkpoint."""

import math

from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import quality
from loraprune_ds.plan.request import Request
from loraprune_ds.zero.flat import partition_numel

Terms = dict[str, int]  # bytes by name


def state_terms(
    shape: ModelShape, lora_rank: int, *, world_size: int, element_size: int, bucket_numel: int, stepped: bool
) -> Terms:
    """Returns the bytes of what `zero.memory.state_tensors` yields, by part.

    A shard of n elements has ceil(n / world_size) of them. A LoRA factor also has an fp32 master (in an fp32 run too)
    and an fp32 gradient. Once the optimizer has stepped there are two fp32 moments. The reduce bucket is fp32.
    """
    held = shape.held(None, element_size).values()
    frozen = sum(x.element_size * partition_numel(math.prod(x.shape), world_size) for x in held)
    lora = sum(partition_numel(numel, world_size) for numel in shape.lora_sizes(lora_rank))
    return {
        "weights": frozen,
        "lora": lora * element_size,
        "lora_masters": lora * 4,
        "lora_moments": lora * 8 if stepped else 0,
        "lora_gradients": lora * 4,
        "reduce_bucket": bucket_numel * 4,
    }


def split_state(
    request: Request, shape: ModelShape, *, stepped: bool = True, measures: bool = False, passed: bool = True
) -> tuple[Terms, Terms]:
    """Returns the terms (on the GPU, in host memory).

    Args:
        stepped: the optimizer has made a step.
        passed: a pass was made at this shape. Until then there is no second copy of the weights (hpZ).
        measures: input moments are kept if `prune.compensate` asks for them.
    """
    terms = state_terms(
        shape,
        request.config.lora.r,
        world_size=request.world_size,
        element_size=request.element_size,
        bucket_numel=request.bucket_numel,
        stepped=stepped,
    )
    if passed and (copies := request.second_copies(shape.held(None, request.element_size).values())):
        terms["second_copy"] = copies
    away = ["weights", "lora", "second_copy"] if request.offloads("param") else []
    if request.offloads("optimizer"):
        away += ["lora_masters", "lora_moments", "lora_gradients"]
    host = {name: terms.pop(name) for name in list(terms) if name in away}
    if request.offloads("optimizer"):
        host["lora_gradients_for_the_step"] = host["lora_gradients"]  # DeepSpeed's CPU optimizer has its own
    if blocks := _pinned_blocks(request, shape, host):
        host["pinned_rounding"] = sum((1 << (block - 1).bit_length()) - block for block in blocks)
    if measures and (moments := max(quality.moments_by_rank(request, shape))):
        terms["input_moments"] = moments
    return terms, host


def checkpoint_terms(request: Request, after_first_cut: ModelShape) -> Terms:
    """Returns the most bytes of a checkpoint on the shared disk, without JSON and headers.

    LoRA, scores and moments are largest before the first cut. `checkpoint.copy_source` writes the dense weights.
    `prune.compensate` writes them from the first cut on. Else they are slices of the source.
    """
    shape, prune, copies = request.shape, request.config.prune, request.config.checkpoint.copy_source
    terms = {
        "lora_state": 12 * sum(shape.lora_sizes(request.config.lora.r)),
        "scores": 8 * sum(sum(layer.values()) for layer in shape.layers),
    }
    if copies or prune.compensate != "none":
        held = (shape if copies else after_first_cut).held(None, request.element_size).values()
        terms["weights"] = sum(x.element_size * math.prod(x.shape) for x in held)
    if prune.compensate != "none":
        terms["input_moments"] = sum(quality.moments_by_rank(request, shape))
    return terms


def _pinned_blocks(request: Request, shape: ModelShape, host: Terms) -> list[int]:
    """Lists the bytes of each page-locked block, before torch rounds it up to a power of two."""
    blocks = []
    if request.pins("param"):  # frozen shards one by one, LoRA's in a buffer
        held = shape.held(None, request.element_size).values()
        blocks += [request.held_shards([x]) for x in held]
        blocks.append(host["lora"])
        if "second_copy" in host:
            blocks += [request.second_copies([x]) for x in held]
    if request.pins("optimizer"):
        blocks += 2 * [host["lora_gradients"]]
    return blocks
