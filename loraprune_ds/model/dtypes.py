"""The dtypes that a run config may ask for, and fast fp32 products on a GPU that lose nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from loraprune_ds.config import Dtype, ModelConfig

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}


def held_as(model: ModelConfig) -> str:
    return model.dtype if model.frozen is None else f"{model.dtype} with {model.frozen} linears"


@contextmanager
def tf32_where_exact(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Allows TF32 for fp32 products of bf16 or fp16 numbers, whose 11 significant bits it keeps. Sums are fp32."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
