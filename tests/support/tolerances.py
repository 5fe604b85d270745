"""Measures how far two tensors differ."""

from torch import Tensor


def worst(found: Tensor, expected: Tensor) -> float:
    """Returns the largest error relative to the largest element. Other elements can be zero but for rounding."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())
