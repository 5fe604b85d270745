"""Checks what a reshard refuses, on one simulated rank. Real ranks: tests/numerics/test_cutting.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.zero.flat import AxisCut, ReshardPlan
from loraprune_ds.zero.reshard import Item, reshard, reshard_each_dtype


class OneRank:
    world_size, rank = 1, 0

    def all_to_all(self, outgoing: Tensor, send: list[int], receive: list[int]) -> Tensor:
        assert send == receive == [len(outgoing)]
        return outgoing


COMM: Any = OneRank()


def item(rows: int, dtype: torch.dtype) -> Item:
    shard = torch.arange(rows * 3).to(dtype)
    return Item(shard, ReshardPlan(AxisCut((rows, 3), 0, torch.arange(1, rows)), 1, 0))


def test_two_dtypes_in_one_buffer_are_refused() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        reshard([item(4, torch.float32), item(5, torch.bfloat16)], COMM)


def test_each_dtype_travels_apart_and_comes_back_in_order() -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    items = [item(rows, dtype) for rows, dtype in enumerate(dtypes, start=3)]
    for shard, given in zip(reshard_each_dtype(items, COMM), items, strict=True):
        assert shard.dtype == given.shard.dtype
        assert torch.equal(shard, given.shard[3:])
