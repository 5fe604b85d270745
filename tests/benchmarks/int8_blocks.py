"""Measures what int8 weights cost in perplexity, by the size of a block of one scale.

    python -m tests.benchmarks.int8_blocks [--windows 48]

SmolLM2-135M in bf16, dense, on windows of 128 tokens of Python's help topics. Its linears are held in bf16, and as int8
with blocks of 32 and 64. The embedded file is Q8_0: its weights lie on a grid of 8 bits already, by blocks of 32 along
the inputs. So the same is done once more `off the grid`, with uniform noise of one step of it on every weight. The
result goes to tests/benchmarks/results/int8_blocks.json.
"""

import argparse
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.files import write_json
from loraprune_ds.model import frozen
from loraprune_ds.model.embedded import embedded_model_dir, embedded_text
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.model.tokenizer import load_tokenizer
from loraprune_ds.report.provenance import hardware, versions

RESULT = Path(__file__).parent / "results" / "int8_blocks.json"
WINDOW, GRID = 128, 32
Weights = dict[tuple[int, str], Tensor]


def off_grid(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Adds up to half a step of Q8_0 to every weight."""
    blocks = weight.float().unflatten(1, (-1, GRID))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    noise = torch.rand(blocks.shape, generator=generator) - 0.5
    return (blocks + noise * step).flatten(1).to(weight.dtype)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    total = 0.0
    for batch in windows.split(8):
        logits = model(batch, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (len(windows) * (WINDOW - 1)))


def measure(model: Any, weights: Weights, block: int | None, windows: Tensor) -> float:
    """Perplexity with the linears held in blocks of this size. None: as they are."""
    axes = {linear.name: linear.axis for linear in LLAMA_LINEARS}
    with patch.object(frozen, "BLOCK", block):
        for (layer, name), weight in weights.items():
            form = frozen.DENSE if block is None else frozen.Int8(axes[name])
            linear = model.model.layers[layer].get_submodule(name)
            linear.weight.data = form.join(form.split(weight, weight.dtype))
    return perplexity(model, windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=48)
    count = parser.parse_args().windows
    folder, generator = embedded_model_dir(), torch.Generator().manual_seed(0)
    ids = torch.tensor(load_tokenizer(folder)("\n\n".join(embedded_text()))["input_ids"])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    windows = windows[torch.randperm(len(windows), generator=generator)[:count]]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    shipped: Weights = {
        (i, linear.name): layer.get_submodule(linear.name).weight.detach().clone()
        for i, layer in enumerate(model.model.layers)
        for linear in LLAMA_LINEARS
    }
    noisy = {key: off_grid(weight, generator) for key, weight in shipped.items()}
    found: dict[str, dict[str, float]] = {}
    for name, weights in (("as shipped", shipped), ("off the grid", noisy)):
        found[name] = {str(block or "bf16"): measure(model, weights, block, windows) for block in (None, 32, 64)}
        print(name, found[name], flush=True)
    write_json(RESULT, {"perplexity": found, "windows": count, "versions": versions(), "hardware": hardware("cpu")})


if __name__ == "__main__":
    main()
