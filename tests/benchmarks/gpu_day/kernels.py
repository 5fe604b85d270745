"""Single kernels: products at odd widths, the scoring of a shard, a refit."""

import time
from collections.abc import Callable
from itertools import product
from unittest.mock import patch

import torch

from loraprune_ds.pruning import criterion
from loraprune_ds.pruning.compensate import refit
from loraprune_ds.pruning.criterion import lora, score_shard
from loraprune_ds.pruning.prunable_model import CollectedLinear, LoraFactors, OwnedShard
from loraprune_ds.ranks.device import current_device, is_cpu
from loraprune_ds.zero.device import accelerator
from tests.benchmarks.gpu_day.engine import device_bytes, sizes
from tests.benchmarks.gpu_day.found import Found

REPEATS = 10
RANK = 8
# Hidden sizes, tokens and MLP widths of a product: even and odd ones.
PRODUCTS = ((4096, 8192), (700, 2048, 8192), (11008, 11007, 11006, 11004, 11000, 10944, 4491, 4480))
TINY_PRODUCTS = ((64,), (16,), (256, 255))


def gemm(found: Found) -> None:
    """Times the forward and backward products of an MLP by its width: TFLOP/s."""
    for hidden, tokens, width in product(*(TINY_PRODUCTS if is_cpu() else PRODUCTS)):
        sides = ((tokens, hidden), (tokens, width), (width, hidden), (hidden, width))
        x, inner, up, down = (
            torch.randn(side, device=current_device(), dtype=torch.bfloat16) for side in sides
        )
        pairs = {"up": (x, up.T), "down": (inner, down.T)}
        pairs |= {"up's input gradient": (inner, up), "down's input gradient": (x, down)}
        seconds = {
            name: seconds_of(lambda pair=pair: torch.mm(*pair)) for name, pair in pairs.items()
        }
        speeds = {name: 2 * tokens * hidden * width / each / 1e12 for name, each in seconds.items()}
        mean = len(speeds) / sum(1 / speed for speed in speeds.values())
        found.row(f"{tokens} x {hidden}, width {width}: TFLOP/s", mean, products=speeds)


def scoring(found: Found) -> None:
    """Times the scores of one layer's up_proj in shards of 1, 8 and 32 ranks, by the size of a block."""
    size, device = sizes("llama-7b"), current_device()
    shape = (size.channels, size.hidden)
    a, b = (
        torch.randn(RANK, size.hidden, device=device),
        torch.randn(size.channels, RANK, device=device),
    )
    factors = LoraFactors(a, b, a * 0.1, b * 0.1, 2.0)
    total = torch.zeros(len(b), dtype=torch.float64, device=device)
    for ranks, power in product((1, 8, 32), (22, 23, 24, 25)):
        flat = torch.randn(shape[0] * shape[1] // ranks, device=device, dtype=torch.bfloat16)
        shard = OwnedShard(flat, 0, shape)
        with patch.object(criterion, "DEVICE_BLOCK_NUMEL", 1 << power):
            seconds = seconds_of(lambda shard=shard: score_shard(total, shard, factors, lora, 0))
        found.row(f"a linear over {ranks} ranks, blocks of 2^{power}: ms", 1e3 * seconds)


def refitting(found: Found) -> None:
    """Solves for down_proj with an eighth of its channels gone, in float64."""
    size, device = sizes("llama-7b"), current_device()
    x = torch.randn(2 * size.channels, size.channels, device=device)
    weight = torch.randn(size.hidden, size.channels, device=device, dtype=torch.bfloat16)
    a, b = (
        torch.zeros(RANK, size.channels, device=device),
        torch.zeros(size.hidden, RANK, device=device),
    )
    linear = CollectedLinear({"weight": weight}, None, a, b, 2.0)
    kept, moment = torch.arange(size.channels * 7 // 8, device=device), x.T @ x
    before = device_bytes()
    for turn in ("first", "second"):  # cuSOLVER begins in the first
        accelerator().reset_peak_memory_stats()
        seconds = seconds_of(lambda: refit(linear, moment, kept, 0.05), repeats=1, warm_up=False)
        found.row(f"{turn} refit of {size.channels} inputs: s", seconds)
    found.keep(
        peak_bytes=int(accelerator().max_memory_allocated()), before=before, after=device_bytes()
    )


def seconds_of(act: Callable[[], object], repeats: int = REPEATS, *, warm_up: bool = True) -> float:
    """Returns the seconds of one call."""
    if warm_up:
        act()
    accelerator().synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        act()
    accelerator().synchronize()
    return (time.perf_counter() - began) / repeats
