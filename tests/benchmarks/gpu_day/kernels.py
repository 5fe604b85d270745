"""Single kernels: products at odd widths, the scoring of a shard, a refit."""

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.compensate import refit
from loraprune_ds.pruning.criterion import lora, score_shard
from loraprune_ds.pruning.prunable_model import CollectedLinear, LoraFactors, OwnedShard
from loraprune_ds.zero.device import accelerator, current_device
from tests.benchmarks.gpu_day.engine import device_bytes, sizes
from tests.benchmarks.gpu_day.found import Found

REPEATS = 10
RANK = 8


def gemm(found: Found) -> None:
    """Times the forward and backward products of an MLP by its width: TFLOP/s."""
    size, device = sizes("llama-7b"), current_device()
    for hidden in size.hiddens:
        for tokens in size.rows:
            x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
            for width in size.widths:
                up = torch.randn(width, hidden, device=device, dtype=torch.bfloat16)
                down = torch.randn(hidden, width, device=device, dtype=torch.bfloat16)
                inner = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
                products: dict[str, Callable[[], Any]] = {
                    "up": lambda x=x, up=up: x @ up.T,
                    "up's input gradient": lambda inner=inner, up=up: inner @ up,
                    "down": lambda inner=inner, down=down: inner @ down.T,
                    "down's input gradient": lambda x=x, down=down: x @ down,
                }
                flops = 2 * tokens * hidden * width
                speeds = {name: flops / seconds_of(product) / 1e12 for name, product in products.items()}
                mean = len(speeds) / sum(1 / speed for speed in speeds.values())
                found.row(f"{tokens} x {hidden}, width {width}: TFLOP/s", mean, products=speeds)


def scoring(found: Found) -> None:
    """Times the scores of one layer's up_proj in shards of 1, 8 and 32 ranks, by the size of a block."""
    size, device = sizes("llama-7b"), current_device()
    shape = (size.channels, size.hidden)
    a, b = torch.randn(RANK, size.hidden, device=device), torch.randn(size.channels, RANK, device=device)
    factors = LoraFactors(a, b, a * 0.1, b * 0.1, 2.0)
    for ranks in (1, 8, 32):
        flat = torch.randn(shape[0] * shape[1] // ranks, device=device, dtype=torch.bfloat16)
        shard = OwnedShard(flat, 0, shape)
        for power in (22, 23, 24, 25):
            with patch.object(criterion, "DEVICE_BLOCK_NUMEL", 1 << power):
                seconds = seconds_of(lambda shard=shard: score_shard(shard, factors, lora, 0))
            found.row(f"a linear over {ranks} ranks, blocks of 2^{power}: ms", 1e3 * seconds)


def refitting(found: Found) -> None:
    """Solves for down_proj with an eighth of its channels gone, in float64."""
    size, device = sizes("llama-7b"), current_device()
    x = torch.randn(2 * size.channels, size.channels, device=device)
    weight = torch.randn(size.hidden, size.channels, device=device, dtype=torch.bfloat16)
    a, b = torch.zeros(RANK, size.channels, device=device), torch.zeros(size.hidden, RANK, device=device)
    linear = CollectedLinear({"weight": weight}, None, a, b, 2.0)
    kept, moment = torch.arange(size.channels * 7 // 8, device=device), x.T @ x
    before = device_bytes()
    for turn in ("first", "second"):  # cuSOLVER begins in the first
        accelerator().reset_peak_memory_stats()
        began = time.perf_counter()
        refit(linear, moment, kept, 0.05)
        accelerator().synchronize()
        found.row(f"{turn} refit of {size.channels} inputs: s", time.perf_counter() - began)
    found.keep(peak_bytes=int(accelerator().max_memory_allocated()), before=before, after=device_bytes())


def seconds_of(act: Callable[[], Any]) -> float:
    """Returns the seconds of one call, after one that warms up."""
    act()
    accelerator().synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        act()
    accelerator().synchronize()
    return (time.perf_counter() - began) / REPEATS
