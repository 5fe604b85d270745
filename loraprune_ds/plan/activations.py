"""Bytes of the activations and logits of one micro-batch on one rank.

README.md in this folder has the formulas. tests/benchmarks/plan_measured.py counts on the graph what autograd keeps.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.flops import mlp_width
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.modules import build_modules, ids, with_layers


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
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.element_size == 4 else torch.bfloat16

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
    source: dict[str, Any], shape: ModelShape, index: int, batch: PlannedBatch, *, lora_rank: int, dropout: bool
) -> int:
    """Returns the bytes that one decoder layer keeps without checkpointing. They are counted on the meta device.

    Args:
        source: config.json of the dense model.
    """
    one = shape.with_layers((shape.layers[index],))
    return _saved_by_layer(json.dumps(with_layers(source, [index])), one, batch, lora_rank, dropout)


@cache
def _saved_by_layer(source: str, shape: ModelShape, batch: PlannedBatch, lora_rank: int, dropout: bool) -> int:
    model = build_modules(
        json.loads(source), shape, lora_rank=lora_rank, dropout=dropout, eager=batch.eager, dtype=batch.dtype
    )
    causal_lm: Any = model.get_base_model()
    causal_lm.enable_input_require_grads()  # as every layer's but the first
    inside = _KeptInside(decoder_layers(model)[0])
    tokens = ids(batch.samples, batch.window)
    # With a mask, else transformers looks at the ids for padding.
    causal_lm.model(input_ids=tokens, attention_mask=tokens.bool(), use_cache=False)
    return inside.bytes_without([*model.parameters()])


class _KeptInside:
    """Collects what autograd keeps during a layer's forward.

    Its first input is its own. The others, such as the rotary angles, belong to all layers.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._kept, self._given = list[Tensor](), list[Tensor]()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        layer.register_forward_pre_hook(self._enter, with_kwargs=True)
        layer.register_forward_hook(self._leave)

    def bytes_without(self, parameters: list[Tensor]) -> int:
        """Counts each storage once."""
        apart = {tensor.untyped_storage()._cdata for tensor in (*self._given, *parameters)}
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in self._kept}
        return sum(count for key, count in storages.items() if key not in apart)

    def _enter(self, _: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        leaves = pytree.tree_leaves((positional[1:], named))
        self._given += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._hooks.__enter__()

    def _leave(self, *_: Any) -> None:
        self._hooks.__exit__()

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor)
        return tensor


def activations(
    source: dict[str, Any],
    shape: ModelShape,
    batch: PlannedBatch,
    *,
    lora_rank: int,
    dropout: bool,
    checkpointing: bool,
) -> int:
    """Returns the most bytes at once during a micro-batch, without logits."""
    t, e = batch.tokens, batch.element_size
    layers = [
        saved_by_layer(source, shape, i, batch, lora_rank=lora_rank, dropout=dropout) for i in range(len(shape.layers))
    ]
    kept = len(layers) * e * t * shape.hidden_size + max(layers) if checkpointing else sum(layers)
    temporaries = max(_backward_temporaries(shape, i, batch) for i in range(len(shape.layers)))
    rotary_angles = 2 * e * batch.window * shape.head_dim
    return kept + temporaries + rotary_angles + batch.causal_mask + _norm(shape, batch)  # the norm before the head


def forward_temporaries(shape: ModelShape, batch: PlannedBatch) -> int:
    """Returns the bytes at the widest place of a pass without backward.

    It is in the MLP or in eager attention. That has masked scores, fp32 probabilities, and their copy.
    """
    e = batch.element_size
    mlp = max(4 * e * batch.tokens * mlp_width(shape, i) for i in range(len(shape.layers)))
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


def _backward_temporaries(shape: ModelShape, layer: int, batch: PlannedBatch) -> int:
    """Returns the bytes of gradients at once: of the residual, and at the widest place of a layer.

    In the MLP there are four: two of the product (from the weight and from LoRA) and those of its factors. A norm has
    three fp32 tensors. Eager attention has fp32 gradients of probabilities and scores.
    """
    t, e, h = batch.tokens, batch.element_size, shape.hidden_size
    widest = max(4 * e * t * mlp_width(shape, layer), 12 * t * h, 8 * batch.probabilities(shape, shape.layers[layer]))
    return 2 * e * t * h + widest
