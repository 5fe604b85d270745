"""What a model costs whatever it runs on: parameters, multiply-accumulates per token, bytes."""

from dataclasses import dataclass

from loraprune_ds.model.shapes import ModelShape


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates per token of a forward pass; norms, rotations and activations are not counted.

    Attributes:
        linear: the decoder layers' linears: one per parameter.
        attention: scores and weighted sum: sum over layers of 2 · query heads · head_dim · mean_context.
        head: vocabulary · hidden size. Looking up an embedding multiplies nothing.
        total: linear + attention + head.
        mean_context: positions a token attends to, itself included, on average over a window.
    """

    linear: int
    attention: float
    head: int
    total: float
    mean_context: float


@dataclass(frozen=True)
class Cost:
    """Counts of one model.

    Attributes:
        parameters: of the whole model, each tensor once, a tied head not again.
        linear_parameters: of the decoder layers' linears, without biases.
        weight_bytes: of all parameters.
        kv_bytes_per_token: that one token adds to the cache: sum over layers of 2 · kv heads · head_dim · element size.
    """

    parameters: int
    linear_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    macs_per_token: Macs


def count_cost(shape: ModelShape, window: int, sliding_window: int | None, element_size: int) -> Cost:
    """Costs on windows of `window` tokens; `sliding_window`: what the model's own attention is limited to."""
    context = mean_context(window, sliding_window)
    kv_width = sum(layer.heads for layer in shape.layers) * shape.head_dim
    linear, head = shape.linear_numel(), shape.vocab_size * shape.hidden_size
    attention = 2 * kv_width * shape.queries_per_group * context
    return Cost(
        parameters=shape.total_numel(),
        linear_parameters=linear,
        weight_bytes=shape.total_numel() * element_size,
        kv_bytes_per_token=2 * kv_width * element_size,
        macs_per_token=Macs(linear, attention, head, linear + attention + head, context),
    )


def mean_context(window: int, sliding_window: int | None) -> float:
    """The mean over t = 1 … window of min(t, sliding_window)."""
    full = min(window, sliding_window or window)
    return (full * (full + 1) / 2 + (window - full) * full) / window
