"""Chooses the attention implementation of transformers that computes all that a family's attention does."""

import torch

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import require
from loraprune_ds.model.family_row import Family


def attn_implementation(asked: str, family: Family) -> str:
    """Returns `asked`, the value of `model.attn_implementation`, or what has to stand in for it.

    The default is sdpa. torch's kernels under it can neither cap attention scores nor add sinks. Old versions of
    transformers drop a cap and say nothing. New ones refuse the model. So such a family gets eager attention.
    """
    return "eager" if asked == "sdpa" and family.eager_only is not None else asked


def check_flash_attention(config: ModelConfig) -> None:
    """Checks that flash attention can run here, if it is asked for. transformers checks its package.

    Raises:
        UserError: there is no GPU, or `model.dtype` is of 32 bits.
    """
    asked = f"model.attn_implementation {config.attn_implementation}"
    if config.attn_implementation.startswith("flash_attention"):
        require(config.dtype != "float32", f"{asked} needs model.dtype bfloat16 or float16; got {config.dtype}")
        require(torch.cuda.is_available(), f"{asked} needs a GPU, and this rank sees none")


def describe_attention(asked: str, family: Family) -> str | None:
    """Says in one line that another implementation is used than the config names. None if it is that one."""
    used = attn_implementation(asked, family)
    if used == asked:
        return None
    return f"model.attn_implementation: {used} instead of {asked}, which lacks {family.eager_only}"
