"""Rotary settings of a Hugging Face config in llama.cpp's terms."""

import math
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType

from loraprune_ds.errors import UserError

KNOWN = ("default", "linear", "llama3")


def add_rope(writer: GGUFWriter, rope: dict[str, Any], head_dim: int, where: str) -> np.ndarray[Any, Any] | None:
    """Writes the keys and returns the tensor `rope_freqs.weight` where the scaling needs one.

    Args:
        rope: `rope_parameters` of the config.

    Raises:
        UserError: a kind of scaling that GGUF files of these models cannot say; `where` is named.
    """
    kind = rope["rope_type"]
    if kind not in KNOWN or "partial_rotary_factor" in rope:
        what = f"rope scaling {kind}" if kind not in KNOWN else "a partial rotary embedding"
        raise UserError(f"{where}: GGUF cannot hold {what} ({', '.join(KNOWN)} it can); formats that can: hf, adapter")
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    return llama3_factors(rope, head_dim) if kind == "llama3" else None


def llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What each rotary frequency is divided by under Llama 3.1's scaling: (head_dim / 2,), fp32.

    Long wavelengths are stretched by `factor`, short ones kept, and those between go smoothly from one to the other
    (rope_type "llama3" of transformers' modeling_rope_utils).
    """
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths  # within the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
