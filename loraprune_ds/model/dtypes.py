"""The dtypes that a run config may ask for, and fast fp32 products on a GPU that lose nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from loraprune_ds.config import Dtype, ModelConfig

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}


def held_as(model: ModelConfig) -> str:
    """Returns the dtype of the frozen weights in words."""
    return model.dtype if model.frozen is None else f"{model.dtype} with {model.frozen} linears"


@contextmanager
def tf32_where_exact(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Lets fp32 products use a GPU's TF32, if the numbers came in `dtype` and lose nothing.

    TF32 keeps 11 bits of a significand. That is all of bf16 and fp16. So every product is exact. Their sums are fp32.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
