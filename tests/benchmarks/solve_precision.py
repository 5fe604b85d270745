"""Compares refits that are solved in fp32, as cuts do, and in float64, on second moments of SmolLM2-135M.

    python -m tests.benchmarks.solve_precision --text wikitext2/valid.txt

15 batches of 8 x 128 tokens are repeated as in a cut that takes random heads and channels, a tenth and then half of
them. The result goes to results/solve_precision.json: the ratio of the squared errors of the outputs, largest of all
linears, the fraction of bf16 weights that differ, and CPU seconds.
"""

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.config import LoraConfig
from loraprune_ds.files import read_text
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.sources import embedded_model_dir
from loraprune_ds.pretrained.tokenizer import load_tokenizer
from loraprune_ds.pruning import replay
from loraprune_ds.pruning.compensate import RIDGE, refit
from loraprune_ds.pruning.passes import Call, Pass
from loraprune_ds.pruning.prunable_model import CollectedLinear
from tests.benchmarks.running import make_parser, record

BATCHES, BATCH = 15, (8, 128)


class Comparison:
    """Solves each refit twice."""

    def __init__(self) -> None:
        self.excess: list[float] = []
        self.differing: list[float] = []
        self.seconds = {"fp32": 0.0, "float64": 0.0}

    def refit(self, linear: CollectedLinear, moment: Tensor, kept: Tensor) -> Tensor:
        began = time.process_time()
        single = refit(linear, moment, kept)
        between = time.process_time()
        double = refit_in_float64(linear, moment.double(), kept)
        self.seconds["fp32"] += between - began
        self.seconds["float64"] += time.process_time() - between
        errors = [error(linear, weight, moment.double(), kept) for weight in (single, double)]
        self.excess.append(errors[0] / errors[1] - 1)
        self.differing.append(float((single != double)[:, kept].float().mean()))
        return single

    def row(self) -> dict[str, Any]:
        return {
            "largest_excess": max(self.excess),
            "least_excess": min(self.excess),
            "weights_that_differ": sum(self.differing) / len(self.differing),
            "cpu_seconds": self.seconds,
        }


def refit_in_float64(linear: CollectedLinear, moment: Tensor, kept: Tensor) -> Tensor:
    """The formula of compensate.py without its check of each output."""
    removed = others(moment, kept)
    system = moment[kept][:, kept]
    system.diagonal().add_(RIDGE * moment.diagonal().mean())
    right = moment[kept][:, removed] @ effective(linear)[:, removed].T
    weight = linear.weight.double()
    weight[:, kept] += torch.cholesky_solve(right, torch.linalg.cholesky(system)).T
    return weight.to(linear.weight.dtype)


def error(linear: CollectedLinear, weight: Tensor, moment: Tensor, kept: Tensor) -> float:
    """Returns the sum of the squared errors of all outputs on the tokens of the moment."""
    difference = weight.double() - linear.weight.double()
    removed = others(moment, kept)
    difference[:, removed] = -effective(linear)[:, removed]
    return float(((difference @ moment) * difference).sum())


def effective(linear: CollectedLinear) -> Tensor:
    return linear.weight.double() + linear.scaling * linear.lora_B.double() @ linear.lora_A.double()


def others(moment: Tensor, kept: Tensor) -> Tensor:
    is_removed = torch.ones(len(moment), dtype=torch.bool)
    is_removed[kept] = False
    return is_removed.nonzero().flatten()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = embedded_model_dir()
    source = open_pretrained(folder)
    text = read_text(arguments.text, "--text")
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"])
    batches = ids[: BATCHES * BATCH[0] * BATCH[1]].view(BATCHES, *BATCH)
    passes: list[Pass] = [{0: Call({"input_ids": batch}, None, None)} for batch in batches]
    generator = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {}
    for removed in (0.1, 0.5):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0)
        model = LocalModel(add_lora(base, source.shape, lora, seed=0), source.shape)
        keep = [
            LayerKeep(
                (kind, torch.randperm(n, generator=generator)[: round(n * (1 - removed))].sort()[0])
                for kind, n in counts.items()
            )
            for counts in source.shape.counts
        ]
        comparison = Comparison()
        with patch.object(replay, "refit", comparison.refit):
            replay.refit_by_replay(model, keep, passes, step=1)
        result[f"{removed:.0%}"] = comparison.row()
    record("solve_precision", result)


if __name__ == "__main__":
    main()
