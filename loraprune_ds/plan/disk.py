"""Bytes that a checkpoint takes on the shared disk, without the headers of its files and its JSON."""

from loraprune_ds.model.family import KINDS
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan import options
from loraprune_ds.plan.request import Request


def checkpoint_terms(request: Request, after_first_cut: ModelShape) -> dict[str, int]:
    """At most, by term: LoRA, scores and moments as before the first cut, and the frozen weights if they are written.

    They are with `checkpoint.copy_source`, and with `prune.compensate` after the first cut; else they are slices of the
    source.
    """
    shape, compensates = request.shape, request.config.prune.compensate != "none"
    terms = {
        "lora_state": 12 * sum(shape.lora_sizes(request.config.lora.r)),
        "scores": 8 * sum(layer.count(kind) for layer in shape.layers for kind in KINDS),
    }
    if request.config.checkpoint.copy_source or compensates:
        weights = shape if request.config.checkpoint.copy_source else after_first_cut
        terms["weights"] = request.element_size * weights.total_numel()
    if compensates:
        terms["input_moments"] = sum(options.moments_by_rank(request, shape))
    return terms
