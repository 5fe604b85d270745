"""Times bf16 matrix products on a CPU: torch's own against the detour through fp32.

    python -m tests.benchmarks.half_products [--tokens 1024]

A run takes the detour where the CPU has no bf16 instructions. The products are the linears of one SmolLM2-135M layer,
forward and backward to their inputs, on one core. The two take turns. Seconds are medians. The result goes to
tests/benchmarks/results/half_products.json.
"""

import argparse
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraprune_ds.files import write_json
from loraprune_ds.report.provenance import hardware, versions
from loraprune_ds.zero.half_products import ThroughFloat32

RESULT = Path(__file__).parent / "results" / "half_products.json"
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))  # (out, in)
ROUNDS = 7
WAYS: dict[str, type[AbstractContextManager[Any]]] = {"torch": nullcontext, "through_float32": ThroughFloat32}


def forward_and_backward(weights: list[Tensor], inputs: list[Tensor], gradients: list[Tensor]) -> float:
    began = time.perf_counter()
    for weight, rows, gradient in zip(weights, inputs, gradients, strict=True):
        linear(rows, weight).backward(gradient)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    weights = [torch.randn(shape).bfloat16() for shape in SHAPES]
    inputs = [torch.randn(arguments.tokens, shape[1]).bfloat16().requires_grad_() for shape in SHAPES]
    gradients = [torch.randn(arguments.tokens, shape[0]).bfloat16() for shape in SHAPES]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, context in WAYS.items():
            with context():
                seconds[way].append(forward_and_backward(weights, inputs, gradients))
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    result = {
        "tokens": arguments.tokens,
        "seconds": medians,
        "ratio": medians["through_float32"] / medians["torch"],
        "bf16_instructions": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "versions": versions(),
        "hardware": hardware("cpu"),
    }
    write_json(RESULT, result)
    print(
        f"{medians['torch']:.3f} s in torch, {medians['through_float32']:.3f} s through fp32: {result['ratio']:.2f} x"
    )


if __name__ == "__main__":
    main()
