"""Costs equal torch's own count of operations and the sizes of real tensors."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from loraprune_ds.evaluate.cost import count_cost, mean_context
from loraprune_ds.evaluate.speed import CACHE
from loraprune_ds.model.classes import causal_lm_class, config_class
from tests.export_cases import CASES, Case, dense_model, exported_config

WINDOW = 24
PRUNED = [case for case in CASES if case.becomes.startswith("pruned")]


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_macs_parameters_and_cache_are_those_of_the_model(case: Case) -> None:
    exported, _, shape = exported_config(dense_model(case), case)
    model: Any = causal_lm_class(case.becomes)(config_class(case.becomes).from_dict(exported.config)).eval()
    input_ids = torch.arange(WINDOW)[None]
    cache: Any = DynamicCache(config=model.config)
    # The math kernel multiplies every pair of positions, so its context is the whole window.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, use_cache=True, **{CACHE: cache})
    cost = count_cost(shape, WINDOW, None, 4)
    macs = cost.macs_per_token
    counted = counter.get_total_flops() / 2 / WINDOW
    assert counted == macs.linear + macs.head + macs.attention * WINDOW / macs.mean_context
    assert macs.total == macs.linear + macs.attention + macs.head
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.weight_bytes == 4 * cost.parameters
    if not case.options.get("sliding_window"):  # such a cache forgets
        cached = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert cost.kv_bytes_per_token * WINDOW == cached


def test_context_is_the_mean_over_the_window() -> None:
    assert mean_context(128, None) == 64.5
    assert mean_context(6, 4) == (1 + 2 + 3 + 4 + 4 + 4) / 6
    assert mean_context(6, 100) == mean_context(6, None) == 3.5
