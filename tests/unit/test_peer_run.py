"""Other methods in tests/benchmarks/peer_run.py and two_four.py, against their formulas."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.pruning.prunable_model import CollectedLinear
from tests.benchmarks.peer_run import METRICS, ExpertNorms, PeerPruner
from tests.benchmarks.two_four import merged_where_kept, two_of_four
from tests.families import SIZES, tiny_model
from tests.family_cuts import dense, find_router
from tests.plain_model import PlainModel
from tests.unit.test_expert_scores import find_stock
from tests.unit.test_experts import merged_stacks
from tests.unit.test_mask_gradients import tiny_run


@pytest.mark.parametrize("name", METRICS)
def test_scores_follow_the_formula_of_the_peer(tmp_path: Path, name: str) -> None:
    run, batch = tiny_run(tmp_path, "llama")
    run.pruner = PeerPruner(name, cast(Any, run.prunable), run.plan, 0)
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def see(key: tuple[int, str], module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.setdefault(key, []).append(inputs[0].detach().flatten(0, 1))

    expected: list[Tensor] = []
    for i, layer in enumerate(run.prunable.layers):
        for _, linear in run.prunable.shape.input_linear_ids([i]):
            lora_linear(layer, linear).register_forward_pre_hook(partial(see, (i, linear.name)))
    tensors = {key: value.clone() for key, value in run.tensors().items()}
    run.step(1, batch)
    for (i, linear), parts in seen.items():
        weight, a, b = (tensors[f"layers.{i}.{linear}.{part}"] for part in ("weight", "lora_A", "lora_B"))
        effective, x = weight + 8 / len(a) * b @ a, torch.cat(parts)
        wanda, flap = effective.abs().sum(0) * x.norm(dim=0), effective.square().sum(0) * x.var(0, correction=0)
        columns = {"wanda": wanda, "flap": flap}[name]
        groups = SIZES["num_key_value_heads" if linear == "self_attn.o_proj" else "intermediate_size"]
        expected.append(columns.view(groups, -1).sum(1))
    found = [scores for pair in run.averages[0] for scores in pair]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.double(), rtol=1e-5, atol=0)  # elements are scored in fp32


@pytest.mark.parametrize("family", ["phi3", "starcoder2"])  # fused linears; biases, and no gate
def test_the_true_gradient_is_that_of_merged_weights(tmp_path: Path, family: str) -> None:
    run, batch = tiny_run(tmp_path, family)
    run.pruner = PeerPruner("gradient", cast(Any, run.prunable), run.plan, 0)
    tensors, shape = run.tensors(), run.prunable.shape
    model = tiny_model(family, seed=1).double()
    expected = [{kind: torch.zeros(n, dtype=torch.float64) for kind, n in x.items()} for x in shape.layers]
    weights = {x: model.get_parameter(f"model.layers.{x.layer}.{x.linear.name}.weight") for x in shape.linear_ids()}
    for (i, linear), weight in weights.items():
        a, b = (tensors[f"layers.{i}.{linear.name}.lora_{factor}"] for factor in "AB")
        weight.data.add_(8 / len(a) * b @ a)
    predictions = model(input_ids=batch[0], use_cache=False).logits[:, :-1].flatten(0, 1)
    cross_entropy(predictions, batch[1][:, 1:].flatten()).backward()
    for (i, linear), weight in weights.items():
        sums = (weight * cast(Tensor, weight.grad)).abs().sum(1 - linear.axis)
        for part, of_part in zip(linear.parts, sums.split(shape.part_sizes(i, linear.parts)), strict=True):
            expected[i][part.kind] += of_part.view(-1, shape.width(part.width)).sum(1).detach()
    run.step(1, batch)
    for layer, wanted in zip(run.averages[0], expected, strict=True):
        for found, of_kind in zip(layer, wanted.values(), strict=True):
            torch.testing.assert_close(found, of_kind, rtol=1e-5, atol=0)  # gradients and elements are in fp32


def test_reap_is_the_mean_of_router_weight_times_output_norm() -> None:
    """Every expert computes every token here. What the router did not choose does not count."""
    network, stacks = dense("mixtral"), iter(merged_stacks(dense("mixtral")).values())
    recorder = ExpertNorms(cast(Any, PlainModel(network.model, network.shape)))
    routed: list[Any] = []
    for layer in decoder_layers(network.model):
        router = find_router(layer)
        router.register_forward_hook(lambda module, inputs, output: routed.append((inputs[0].flatten(0, -2), output)))
    with recorder.record():
        for _ in range(2):  # as two micro-batches
            network.logits()
        found = recorder.scores(1).by_layer("none")
    for i, (hidden, (_, weights, chosen)) in enumerate(routed[:2]):
        merged = {"gate_up_proj": next(stacks)[0], "down_proj": next(stacks)[0]}
        stock = find_stock(tiny_model("mixtral"), i)
        wanted = torch.zeros(23)
        for e in range(23):
            one = torch.full((len(hidden), 1), e), torch.ones(len(hidden), 1)
            norms = functional_call(stock, merged, (hidden, *one)).norm(dim=1)
            picked = chosen == e
            wanted[e] = (norms[:, None] * weights)[picked].sum() / picked.sum().clamp(min=1)
        torch.testing.assert_close(found[i]["experts"].float(), wanted)
    assert not any(layer["heads"].any() for layer in found)


def test_two_of_four_weights_stay_and_a_merge_keeps_the_zeros() -> None:
    weight = torch.tensor([[1.0, -2, 3, 4, 0.5, 8, 1, 2]])
    norms = torch.tensor([9.0, 1, 1, 1, 1, 1, 7, 1])
    masked = two_of_four(weight, norms)
    assert masked.tolist() == [[1, 0, 0, 4, 0, 8, 1, 0]]
    linear = CollectedLinear({"weight": masked}, None, lora_A=torch.ones(1, 8), lora_B=torch.ones(1, 1), scaling=2.0)
    merged = merged_where_kept(linear, "float32")
    assert merged["weight"].tolist() == [[3, 0, 0, 6, 0, 10, 3, 0]]
