"""Measures what a sum over ranks in bf16 costs: for the true gradient (`criterion: gradient`) and the input moments.

    python -m tests.benchmarks.wire_dtype [--ranks 2 8]

One process plays all ranks on SmolLM2-135M in bf16. Each has one window of Python's help topics. A ring adds in fp32,
and rounds what it passes on. So a sum in bf16 rounds once per rank. The gradients are those of the frozen weights. Even
without this autograd forms them in bf16. The result goes to tests/benchmarks/results/wire_dtype.json.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds.errors import RunError
from loraprune_ds.files import write_json
from loraprune_ds.model.embedded import embedded_model_dir, embedded_text
from loraprune_ds.pruning.compensate import refit
from loraprune_ds.pruning.prunable_model import CollectedLinear
from loraprune_ds.report.provenance import hardware, versions

RESULT = Path(__file__).parent / "results" / "wire_dtype.json"
WINDOW, RIDGE = 128, 0.05  # the default of prune.compensate_ridge
INPUTS = ("o_proj", "down_proj")  # whose columns go
Sums = dict[str, Tensor]


def windows(count: int) -> Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(embedded_model_dir())
    text = "\n\n".join(embedded_text())[: count * WINDOW * 8]  # more than enough
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: count * WINDOW].view(count, 1, WINDOW)


def add_rounded(total: Tensor, part: Tensor) -> Tensor:
    """Adds as a ring does: in fp32, and what goes on is bf16."""
    return (total.float() + part.float()).bfloat16()


class Ranks:
    """Adds up over ranks, in fp32 and in bf16."""

    def __init__(self) -> None:
        self.exact, self.rounded = Sums(), Sums()

    def add(self, name: str, part: Tensor) -> None:
        if name in self.exact:
            self.exact[name] += part.float()
            self.rounded[name] = add_rounded(self.rounded[name], part)
        else:
            self.exact[name], self.rounded[name] = part.float().clone(), part.bfloat16()


def channel_scores(gradients: Sums, weights: Sums) -> Tensor:
    """Returns the scores of the MLP's channels, (layers, channels): |gW ⊙ W| of gate, up and down, added up."""
    layers = len([name for name in weights if name.endswith("down_proj")])
    rows = []
    for i in range(layers):
        of = {n: f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up", "down")}
        parts = {n: (gradients[name].float() * weights[name].float()).abs().double() for n, name in of.items()}
        rows.append(parts["gate"].sum(1) + parts["up"].sum(1) + parts["down"].sum(0))
    return torch.stack(rows)


def kept(scores: Tensor) -> Tensor:
    """Returns the half of each layer's channels that stays, as a mask."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(scores.shape[1] // 2, 1).indices, value=True)


def compare(exact: Tensor, other: Tensor) -> dict[str, float]:
    error = (other - exact).abs() / exact
    return {
        "median_relative_error": float(error.median()),
        "largest_relative_error": float(error.max()),
        "kept_channels_that_differ": float((kept(exact) & ~kept(other)).sum() / kept(exact).sum()),
    }


def refit_errors(weights: Sums, moments: Ranks, keep: Tensor) -> dict[str, Any]:
    """Compares the refits of down_proj by either sum. Errors are relative to the power of the outputs."""
    errors: dict[str, list[float]] = {"no refit": [], "fp32": [], "bf16": []}
    lowest: dict[str, list[float]] = {"fp32": [], "bf16": []}
    failed = 0
    for i, mask in enumerate(keep):
        name = f"model.layers.{i}.mlp.down_proj"
        weight, moment = weights[name], moments.exact[name]
        indices = mask.nonzero().flatten()
        nothing = torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)
        linear = CollectedLinear({"weight": weight}, None, *nothing, scaling=1.0)
        errors["no refit"].append(_error(weight, weight, moment, mask))
        for wire, sums in (("fp32", moments.exact), ("bf16", moments.rounded)):
            given = sums[name].float()
            lowest[wire].append(smallest_eigenvalue(given, indices))
            try:
                errors[wire].append(_error(refit(linear, given, indices, RIDGE), weight, moment, mask))
            except RunError:
                failed += 1
    found: dict[str, Any] = {name: sum(of) / max(1, len(of)) for name, of in errors.items()}
    return {
        "mean_squared_error": found,
        "smallest_eigenvalue": {wire: min(of) for wire, of in lowest.items()},
        "layers_with_a_negative_one": {wire: sum(value < 0 for value in of) for wire, of in lowest.items()},
        "bf16_refits_that_failed": failed,
    }


def record(moments: Ranks, name: str, module: nn.Module, given: tuple[Tensor, ...]) -> None:
    moments.add(name, _second_moment(given[0]))


def smallest_eigenvalue(moment: Tensor, indices: Tensor) -> float:
    """Returns that of the kept inputs, over the mean square of all. The ridge adds RIDGE to it."""
    part = moment.double()[indices][:, indices]
    return float(torch.linalg.eigvalsh((part + part.T) / 2)[0] / moment.double().diagonal().mean())


def _error(new: Tensor, old: Tensor, moment: Tensor, mask: Tensor) -> float:
    step = torch.where(mask, new, 0).double() - old.double()
    lost, power = ((m @ moment.double() * m).sum(1) for m in (step, old.double()))
    return float(lost.sum() / power.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 8])
    arguments = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.bfloat16)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n}
    model.requires_grad_(False)
    moments = Ranks()
    for name, module in linears.items():
        module.weight.requires_grad_(True)
        if name.endswith(INPUTS):
            module.register_forward_pre_hook(partial(record, moments, name))
    weights = {name: module.weight.detach() for name, module in linears.items()}
    gradients, found, first_half = Ranks(), dict[str, Any](), Sums()
    for rank, ids in enumerate(windows(max(arguments.ranks)), start=1):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, module in linears.items():
            gradients.add(name, cast(Tensor, module.weight.grad))
            module.weight.grad = None
        if rank == max(arguments.ranks) // 2:
            first_half = {name: total.clone() for name, total in gradients.exact.items()}
        if rank in arguments.ranks:
            exact = channel_scores(gradients.exact, weights)
            found[str(rank)] = compare(exact, channel_scores(gradients.rounded, weights))
            print(rank, found[str(rank)], flush=True)
    second = {name: gradients.exact[name] - first for name, first in first_half.items()}
    other_data = compare(channel_scores(first_half, weights), channel_scores(second, weights))
    moment = refit_errors(weights, moments, kept(channel_scores(gradients.exact, weights)))
    facts = {"window": WINDOW, "ridge": RIDGE, "versions": versions(), "hardware": hardware("cpu")}
    write_json(RESULT, {"gradient": found, "other_data": other_data, "down_proj_refit": moment, **facts})
    print(other_data, moment)


@torch.no_grad()
def _second_moment(inputs: Tensor) -> Tensor:
    rows = inputs.flatten(0, -2).float()
    return rows.T @ rows


if __name__ == "__main__":
    main()
