"""Costs of a model on any hardware: parameters, multiply-accumulates (MACs) per token, bytes."""

from dataclasses import dataclass

from loraprune_ds.model.flops import active_numel, attention_product, cached_numel
from loraprune_ds.model.shapes import ModelShape


@dataclass(frozen=True)
class Macs:
    """Holds multiply-accumulates per token of a forward pass, without norms, rotations and activations.

    Attributes:
        linear: of the decoder layers' linears: one per parameter, without experts that a token does not choose.
        attention: of scores and weighted sum: sum over layers of 2 · query heads · head_dim · mean_context.
        head: vocabulary · hidden size. An embedding is looked up and multiplies nothing.
        total: linear + attention + head.
        mean_context: positions that a token attends to, itself included. The mean over a window.
    """

    linear: int
    attention: float
    head: int
    total: float
    mean_context: float


@dataclass(frozen=True)
class ModelCost:
    """Holds counts of one model.

    Attributes:
        parameters: of the whole model. Each tensor counts once, also a tied head.
        linear_parameters: of the decoder layers' linears, without biases.
        weight_bytes: of all parameters.
        kv_bytes_per_token: added to the cache: sum over layers of 2 · kv heads · head_dim · element size.
    """

    parameters: int
    linear_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    macs_per_token: Macs


def count_cost(shape: ModelShape, window: int, sliding_window: int | None, element_size: int) -> ModelCost:
    """Counts the costs on windows of `window` tokens. `sliding_window` is the limit of the model's attention."""
    context = mean_context(window, sliding_window)
    linear, head = active_numel(shape), shape.vocab_size * shape.hidden_size
    attention = attention_product(shape, context)  # two products have as many multiply-adds
    return ModelCost(
        parameters=shape.total_numel(),
        linear_parameters=shape.linear_numel(),
        weight_bytes=shape.total_numel() * element_size,
        kv_bytes_per_token=cached_numel(shape) * element_size,
        macs_per_token=Macs(linear, attention, head, linear + attention + head, context),
    )


def mean_context(window: int, sliding_window: int | None) -> float:
    """Returns the mean over t = 1 … window of min(t, sliding_window)."""
    full = min(window, sliding_window or window)
    return (full * (full + 1) / 2 + (window - full) * full) / window
