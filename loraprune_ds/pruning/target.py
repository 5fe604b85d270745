"""`prune.target`: the size of a model in parameters, or in the memory of a server."""

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Amount
from loraprune_ds.files import JsonObject
from loraprune_ds.model.shape import ModelShape, cached_numel, state_numel

BYTES = 2  # of a value in the KV cache, the embedding, the head, norms and biases


def server_memory(config: PruneConfig, shape: ModelShape) -> dict[str, float]:
    """Counts the bytes on a server, for the weights and for a KV cache of `prune.target_context` tokens.

    Delta nets have an fp32 state for each sequence instead. One state counts.
    """
    linear = shape.linear_numel()
    weights = linear * config.target_weight_bits / 8 + (shape.total_numel() - linear) * BYTES
    cache = BYTES * cached_numel(shape) * config.target_context + 4 * state_numel(shape)
    return {"weights": weights, "kv_cache": cache}


def measure(config: PruneConfig, shape: ModelShape, amount: Amount) -> float:
    """Returns the size of a model in the unit of an amount."""
    if amount.unit == "bytes":
        return sum(server_memory(config, shape).values())
    return shape.total_numel()


def describe_target(
    config: PruneConfig, dense: ModelShape, pruned: ModelShape
) -> JsonObject | None:
    """Makes the report's entry about the target, or None without a target."""
    amount = config.target_amount
    if amount is None:
        return None
    entry = {
        "asked": config.target,
        "unit": amount.unit,
        "value": amount.value,
        "dense": measure(config, dense, amount),
        "reached": measure(config, pruned, amount),
    }
    if amount.unit == "bytes":
        entry |= server_memory(config, pruned)
    return entry
