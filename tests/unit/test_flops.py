"""The operations of a step against a product by product count."""

import pytest

from loraprune_ds.model.flops import needed_flops_per_token
from tests.unit.shapes_and_scores import LLAMA_7B, make_shape


def test_each_product_of_a_tiny_model() -> None:
    """Two layers, 2 key-value heads with 3 queries each of width 4, 10 channels, hidden 8, 50 words, 6 tokens."""
    shape = make_shape([(2, 10)] * 2, hidden=8, head_dim=4, queries_per_group=3)
    linears = 2 * (8 * 24 + 8 * 8 + 8 * 8 + 24 * 8 + 3 * 8 * 10)  # q, k, v, o and gate, up, down of two layers
    forward = 2 * linears + 2 * 8 * 50
    scores_and_values = 2 * 2 * (2 * 24 * 3)  # two layers, two products, 24 query columns over 3 tokens on average
    assert needed_flops_per_token(shape, 6) == 2 * forward + 3 * scores_and_values


def test_of_llama_7b() -> None:
    assert needed_flops_per_token(LLAMA_7B, 512) == pytest.approx(4 * 6.5e9, rel=0.05)
