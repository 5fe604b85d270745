"""What a server with so much memory can hold: the dense model, and the pruned one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraprune_ds.errors import require
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.cluster import GIB
from loraprune_ds.plan.request import Request
from loraprune_ds.pruning.target import server_memory


@dataclass(frozen=True)
class Serving:
    """Describes a model on a server.

    Attributes:
        weights: bytes.
        tokens: of all sequences that the KV cache has room for beside the weights. 0 if the weights do not fit.
    """

    model: str
    parameters: int
    weights: float
    tokens: int


def servings(request: Request, gib: float) -> list[Serving]:
    """Returns the dense and the pruned model on a server, at the bits of `prune.target_*`.

    Raises:
        UserError: the memory is no number above 0.
    """
    require(math.isfinite(gib) and gib > 0, f"--server-memory must be a number above 0; got {gib}")
    pruned = request.shape_at(request.schedule.ratio)
    return [_serving(request, name, shape, gib) for name, shape in (("dense", request.shape), ("pruned", pruned))]


def _serving(request: Request, name: str, shape: ModelShape, gib: float) -> Serving:
    memory = server_memory(request.config.prune, shape)
    tokens = max(0, math.floor((gib * GIB - memory.weights) / memory.per_token))
    return Serving(name, shape.total_numel(), memory.weights, tokens)


def serving_rows(found: Sequence[Serving]) -> list[str]:
    """Writes a line per model."""
    return [_row(serving) for serving in found]


def _row(serving: Serving) -> str:
    room = f"{serving.tokens:,} tokens of KV cache" if serving.tokens else "they do not fit"
    return f"on the server, {serving.model}: {serving.weights / GIB:.2f} GiB of weights, {room}"
