"""The loss scale of fp16: what to do with gradients that may have overflowed."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from loraprune_ds.config import Dtype
from loraprune_ds.errors import RunError

Decision = Literal["update", "skip"]


def unscale(gradient: Tensor, loss_scale: float) -> Tensor:
    """Returns the gradient of the unscaled loss. The criterion is not linear in it (gB·gA), so scores need that."""
    return gradient if loss_scale == 1 else gradient / loss_scale


def first_nonfinite(gradients: list[Tensor]) -> int | None:
    """Returns the index of the first tensor that holds an inf or a NaN. None if all are finite."""
    return next((i for i, gradient in enumerate(gradients) if not torch.isfinite(gradient).all()), None)


def decide(bad_layers: list[int | None], losses: list[float], *, dtype: Dtype, step: int) -> Decision:
    """Decides if a step's gradients can be scored and applied. Every rank has looked at its shards.

    In fp16 a non-finite gradient means that the loss scale was too high. The step is skipped and not scored.

    Args:
        bad_layers: per rank, the first layer with a non-finite LoRA gradient. If the loss is not finite, all gradients
            are NaN. Then it is the first layer with a non-finite weight.
        losses: per rank, its part of the loss.

    Raises:
        RunError: a loss is not finite. Or a gradient is not, and the dtype has no loss scale. It names layer and step.
    """
    if lost := [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]:
        weights = [layer for rank in lost if (layer := bad_layers[rank]) is not None]
        where = f"; the weights of layer {min(weights)} are not finite" if weights else ""
        raise RunError(f"step {step}: the loss is {losses[lost[0]]} on rank {lost[0]}{where}")
    found = [layer for layer in bad_layers if layer is not None]
    if not found:
        return "update"
    if dtype == "float16":
        return "skip"
    raise RunError(f"step {step}: the LoRA gradient of layer {min(found)} is not finite")


def optimizer_step(engine: Any, *, skipped: bool) -> None:
    """Makes the update at the end of a step. Sets the next learning rate.

    Args:
        skipped: whether fp16's gradients overflowed. Then DeepSpeed makes no update and leaves the learning rate where
            it is. But the schedule counts all steps of the run. Cuts and the recovery do so too.
    """
    engine.step()
    if skipped:
        engine.lr_scheduler.step()
