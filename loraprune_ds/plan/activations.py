"""Bytes of the activations and logits of one micro-batch on one rank.

README.md in this folder has the formulas. tests/benchmarks/plan_measured.py counts on the graph what autograd keeps.
"""

from dataclasses import dataclass

from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape

DROPOUT_MASK = 1  # bytes of an element of torch's fused mask, on a GPU


@dataclass(frozen=True)
class PlannedBatch:
    """Describes one micro-batch: `samples` windows of `window` tokens.

    Attributes:
        eager: attention holds whole matrices of probabilities.
    """

    samples: int
    window: int
    element_size: int
    eager: bool = False

    @property
    def tokens(self) -> int:
        return self.samples * self.window

    @property
    def copy_size(self) -> int:
        """Returns the bytes of an element beside its fp32 form. An fp32 model has no other form."""
        return self.element_size if self.element_size < 4 else 0

    @property
    def causal_mask(self) -> int:
        """Returns the bytes of the mask of eager attention."""
        return self.eager * self.element_size * self.samples * self.window**2

    def probabilities(self, shape: ModelShape, layer: LayerShape) -> int:
        """Counts the elements of one layer's attention probabilities. Only eager attention makes them."""
        return self.eager * self.samples * shape.query_heads(layer) * self.window**2


def saved_by_layer(
    shape: ModelShape,
    layer: LayerShape,
    batch: PlannedBatch,
    *,
    lora_rank: int,
    dropout: bool,
    mask_size: int = DROPOUT_MASK,
) -> int:
    """Returns the bytes that one decoder layer keeps without checkpointing."""
    t, e, h, f = batch.tokens, batch.element_size, shape.hidden_size, layer["channels"]
    query_heads, key_width = shape.query_heads(layer), layer["heads"] * shape.head_dim
    query_width = query_heads * shape.head_dim
    attention = e * t * (2 * query_width + 2 * key_width) + 4 * t * query_heads
    if batch.eager:
        attention = e * t * 4 * query_width + batch.probabilities(shape, layer) * (4 + batch.copy_size)
    lora = len(shape.linears) * e * t * lora_rank
    dropped = t * (e + mask_size) * (5 * h + query_width + f) if dropout else 0
    return 2 * _norm(shape, batch) + attention + 4 * e * t * f + lora + dropped


def activations(shape: ModelShape, batch: PlannedBatch, *, lora_rank: int, dropout: bool, checkpointing: bool) -> int:
    """Returns the most bytes at once during a micro-batch, without logits."""
    t, e = batch.tokens, batch.element_size
    layers = [saved_by_layer(shape, layer, batch, lora_rank=lora_rank, dropout=dropout) for layer in shape.layers]
    kept = len(layers) * e * t * shape.hidden_size + max(layers) if checkpointing else sum(layers)
    temporaries = max(_backward_temporaries(shape, layer, batch) for layer in shape.layers)
    rotary_angles = 2 * e * batch.window * shape.head_dim
    return kept + temporaries + rotary_angles + batch.causal_mask + _norm(shape, batch)  # the norm before the head


def forward_temporaries(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes at the widest place of a pass without backward.

    It is in the MLP or in eager attention. That has masked scores, fp32 probabilities, and their copy.
    """
    e = batch.element_size
    mlp = max(4 * e * batch.tokens * layer["channels"] for layer in shape.layers)
    scores = max((e + 4 + batch.copy_size) * batch.probabilities(shape, layer) for layer in shape.layers)
    return max(mlp, scores) + batch.causal_mask


def logits(shape: ModelShape, batch: PlannedBatch, chunk_tokens: int | None) -> int:
    """Returns the bytes of a chunk's logits, in the model's dtype and in fp32.

    Hidden states before the head and their gradient come on top, for all tokens.
    """
    chunk = min(batch.tokens, chunk_size(shape.vocab_size, chunk_tokens, buffers=1))
    return chunk * shape.vocab_size * (4 + batch.copy_size) + 2 * batch.tokens * shape.hidden_size * batch.element_size


def _norm(shape: ModelShape, batch: PlannedBatch) -> int:
    t, h = batch.tokens, shape.hidden_size
    return 4 * t * h + 4 * t + batch.element_size * t * h


def _backward_temporaries(shape: ModelShape, layer: LayerShape, batch: PlannedBatch) -> int:
    """Returns the bytes of gradients at once: of the residual, and at the widest place of a layer.

    In the MLP there are four: two of the product (from the weight and from LoRA) and those of its factors. A norm has
    three fp32 tensors. Eager attention has fp32 gradients of probabilities and scores.
    """
    t, e, h = batch.tokens, batch.element_size, shape.hidden_size
    widest = max(4 * e * t * layer["channels"], 12 * t * h, 8 * batch.probabilities(shape, layer))
    return 2 * e * t * h + widest
