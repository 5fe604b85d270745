"""Measures memory and time of the loss over a large vocabulary, in chunks and with all logits at once.

    python -m tests.benchmarks.loss_memory [--tokens 1024] [--vocabulary 128256]

torch computes it with all logits at once. Both run in bf16, forward and backward to the hidden states. The head is
frozen. The two take turns. Seconds are medians. Memory is RssAnon + RssShmem, sampled every 5 ms. The memory of the
inputs is taken off. The result goes to tests/benchmarks/results/loss_memory.json.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraprune_ds.files import write_json
from loraprune_ds.model.distillation import chunk_size
from loraprune_ds.model.logits import Head, LogitsTransform
from loraprune_ds.model.token_loss import token_losses
from loraprune_ds.report.provenance import hardware, versions
from tests.benchmarks.peak import Peak

RESULT = Path(__file__).parent / "results" / "loss_memory.json"
HIDDEN, ROUNDS = 512, 3
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def at_once(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t())[:, :-1].flatten(0, 1).float()
    return cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")


def in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return token_losses(hidden, Head(weight, LogitsTransform()), labels).sum()


def measure(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[float, int, Tensor]:
    hidden = hidden.clone().requires_grad_()
    began = time.perf_counter()
    with Peak() as peak:
        loss(hidden, weight, labels).backward()
    assert hidden.grad is not None
    return time.perf_counter() - began, peak.extra, hidden.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=128_256)  # Llama 3's
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, arguments.tokens, HIDDEN, generator=generator).bfloat16()
    weight = (torch.randn(arguments.vocabulary, HIDDEN, generator=generator) / HIDDEN**0.5).bfloat16()
    labels = torch.randint(arguments.vocabulary, (1, arguments.tokens), generator=generator)
    rows: dict[str, Any] = {"at_once": [], "in_chunks": []}
    for _ in range(ROUNDS):
        for loss in (at_once, in_chunks):
            rows[loss.__name__].append(measure(loss, hidden, weight, labels))
    gradients = [rows[name][0][2].float() for name in rows]
    result: dict[str, Any] = {
        name: {"seconds": statistics.median(row[0] for row in found), "extra_bytes": max(row[1] for row in found)}
        for name, found in rows.items()
    }
    result["seconds_ratio"] = result["in_chunks"]["seconds"] / result["at_once"]["seconds"]
    result["largest_gradient_difference"] = float((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max())
    facts = {
        "hidden_size": HIDDEN,
        "chunk_tokens": chunk_size(arguments.vocabulary, None, buffers=1),
        **vars(arguments),
    }
    write_json(RESULT, result | facts | {"versions": versions(), "hardware": hardware("cpu")})
    for name in rows:
        print(f"{name}: {result[name]['extra_bytes'] / 1e9:.2f} GB, {result[name]['seconds']:.2f} s")
    print(f"gradients differ by {result['largest_gradient_difference']:.1e} of the largest")


if __name__ == "__main__":
    main()
