"""Bytes of the activations and logits of one micro-batch on one rank. README.md has the formulas."""

from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.flops import mlp_width
from loraprune_ds.model.saved_activations import saved_by_layer
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.request import PlannedBatch, Request


def activations(request: Request, shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the most bytes at once during a micro-batch, without logits.

    Of gradients there are those of the residual and of the widest place of a layer. In the MLP these are four: two of
    the product (from the weight and from LoRA) and those of its factors. A norm has three fp32 tensors. Eager attention
    has fp32 gradients of probabilities and scores.
    """
    t, e, h, indices = batch.tokens, batch.element_size, shape.hidden_size, range(len(shape.layers))
    layers = [saved_in_layer(request, shape, i, batch) for i in indices]
    checkpointed = len(layers) * e * t * h + max(layers)
    kept = checkpointed if request.config.train.gradient_checkpointing else sum(layers)
    widest = max(max(4 * e * t * mlp_width(shape, i), 8 * batch.probabilities(shape, shape.layers[i])) for i in indices)
    gradients = 2 * e * t * h + max(widest, 12 * t * h)
    rotary_angles, last_norm = 2 * e * batch.window * shape.head_dim, 4 * t * h + 4 * t + e * t * h
    return kept + gradients + rotary_angles + batch.causal_mask + last_norm


def forward_temporaries(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes at the widest place of a pass without backward.

    It is in the MLP or in eager attention. That has masked scores, fp32 probabilities, and their copy.
    """
    e = batch.element_size
    mlp = max(4 * e * batch.tokens * mlp_width(shape, i) for i in range(len(shape.layers)))
    scores = max((e + 4 + batch.copy_size) * batch.probabilities(shape, layer) for layer in shape.layers)
    return max(mlp, scores) + batch.causal_mask


def logits(shape: ModelShape, batch: PlannedBatch, chunk_tokens: int | None = None) -> int:
    """Returns the bytes of a chunk's logits, in the model's dtype and in fp32.

    Hidden states before the head and their gradient come on top, for all tokens.
    """
    chunk = min(batch.tokens, chunk_size(shape.vocab_size, chunk_tokens, buffers=1))
    return chunk * shape.vocab_size * (4 + batch.copy_size) + 2 * batch.tokens * shape.hidden_size * batch.element_size


def saved_in_layer(request: Request, shape: ModelShape, index: int, batch: PlannedBatch) -> int:
    """Returns the bytes that autograd keeps of a layer without checkpointing."""
    lora, size = request.config.lora, (batch.samples, batch.window)
    options = {"lora_rank": lora.r, "dropout": lora.lora_dropout > 0, "eager": batch.eager}
    return saved_by_layer(request.source, shape, index, size, DTYPES[request.config.model.dtype], **options)
