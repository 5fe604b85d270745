"""The refit before a cut, on 1, 2 and 3 ZeRO-3 ranks, against torch.linalg.lstsq on the inputs of ordinary passes.

Those passes are made with the weights that the cut finds, without dropout, over all samples of all kept steps.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import quality_settings
from tests.support.driver import Job, family_job, tiny_job, train
from tests.support.ranks import RankPool

# MLP weights do not divide by 2 or 3
LAYERS, KV_HEADS, QUERIES, HEAD_DIM, HIDDEN, FFN = 5, 5, 5, 4, 25, 61
HEADS, CHANNELS = [0, 2, 3], [c for c in range(FFN) if c % 3]
RIDGE, SCALING = 0.05, 2.0
# The refit is solved in fp64 from moments that are summed in fp32. Their rounding is 1e-7. It grows by the condition
# number of C[K, K] + ridge, which is below 100 for these activations.
TOLERANCE = 1e-5
TOKENS = 12 * 16  # of a step


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("compensation")
    sizes = {
        "heads": KV_HEADS * QUERIES,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden": HIDDEN,
        "ffn": FFN,
    }
    sizes |= {"layers": LAYERS, "biases": True}
    # the first cut follows the fourth step
    prune = {"ratio": 0.2, "prune_every": 1, "warmup_fraction": 0.5, "compensate": "least_squares"}
    return tiny_job(folder, prune, steps=6, model=sizes, lora_dropout=0.3)


def kept_columns(name: str) -> list[int]:
    width = QUERIES * HEAD_DIM
    return CHANNELS if "mlp" in name else [h * width + j for h in HEADS for j in range(width)]


def effective(layer: dict[str, Tensor]) -> Tensor:
    return (
        layer["base_layer"].double() + SCALING * layer["lora_B"].double() @ layer["lora_A"].double()
    )


def dense_refit(inputs: Tensor, layer: dict[str, Tensor], kept: list[int]) -> Tensor:
    """Returns W[:, K] + ΔW by least squares on the inputs themselves. The ridge has its own rows."""
    removed = [j for j in range(inputs.shape[1]) if j not in kept]
    ridge = math.sqrt(RIDGE * float(inputs.square().sum(0).mean()))
    system = torch.cat([inputs[:, kept], ridge * torch.eye(len(kept), dtype=torch.float64)])
    wanted = inputs[:, removed] @ effective(layer)[:, removed].T
    solution = torch.linalg.lstsq(
        system, torch.cat([wanted, wanted.new_zeros(len(kept), wanted.shape[1])])
    ).solution
    return layer["base_layer"].double()[:, kept] + solution.T


def own_error(
    inputs: Tensor, before: dict[str, Tensor], after: dict[str, Tensor], kept: list[int]
) -> float:
    """Returns the squared error of the layer's output once the other columns are gone."""
    remaining = inputs[:, kept] @ effective(after)[:, kept].T
    return float((remaining - inputs @ effective(before).T).square().sum())


def assert_refitted(result: dict[str, Any], name: str, kept: list[int]) -> None:
    """Checks the refit of a linear of a layer that is cut."""
    inputs = result["inputs"][name].double()
    assert len(inputs) == sum(result["tokens"])
    layer = result["before"][name]
    after = result["after"][name]
    expected = dense_refit(inputs, layer, kept)
    assert (after["base_layer"][:, kept] - expected).abs().max() < TOLERANCE, name
    for missing in (inputs[:-16], inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]):
        other = dense_refit(missing, layer, kept)
        assert (other - expected).abs().max() > 10 * TOLERANCE, "every token must matter"
    assert all(torch.equal(layer[n], after[n]) for n in layer if n != "base_layer")
    assert own_error(inputs, layer, after, kept) < 0.99 * own_error(inputs, layer, layer, kept)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_refit_is_the_dense_least_squares_solution(
    ranks: RankPool, job: Job, world_size: int
) -> None:
    results = ranks.run(world_size, quality_settings.compensate_once, job, HEADS, CHANNELS)
    result = results[0]
    assert result["tokens"] == [TOKENS, TOKENS]
    assert result["before"].keys() == {
        f"{i}.{linear}" for i in range(LAYERS) for linear in quality_settings.INPUTS
    }
    for name, layer in result["before"].items():
        for part, tensor in layer.items():
            assert torch.equal(tensor, result["untouched"][name][part]), "nothing was removed"
        if int(name[0]) in quality_settings.CUT_LAYERS:
            assert_refitted(result, name, kept_columns(name))
        else:
            assert torch.equal(layer["base_layer"], result["after"][name]["base_layer"]), name
    for rank, other in enumerate(results):
        assert other["passes"] == [6 / world_size] * 2
        own = {i for i in quality_settings.CUT_LAYERS if i % world_size == rank}
        assert other["computed"] == own
        # its own layer, and the one that is measured
        assert other["halves"] <= 2 * (2 if world_size > 1 else 1)
        assert math.isfinite(other["next_loss"])


def test_a_mixture_refits_its_heads_alone(ranks: RankPool, tmp_path: Path) -> None:
    """Experts leave in the same cut. Their inputs are not measured, and nothing of the others changes."""
    prune = {
        "ratio": 0.2,
        "head_ratio": 0.2,
        "prune_every": 1,
        "warmup_fraction": 0.5,
        "compensate": "least_squares",
    }
    mixture, _ = family_job(
        tmp_path, "mixtral", prune, steps=6, model={"num_hidden_layers": LAYERS}
    )
    experts = [e for e in range(23) if e % 4]
    result = ranks.run(2, quality_settings.compensate_once, mixture, HEADS, experts)[0]
    assert result["before"].keys() == {f"{i}.self_attn.o_proj" for i in range(LAYERS)}
    for name, layer in result["before"].items():
        if int(name[0]) in quality_settings.CUT_LAYERS:
            assert_refitted(result, name, [h * 20 + j for h in HEADS for j in range(20)])
        else:
            assert torch.equal(layer["base_layer"], result["after"][name]["base_layer"]), name
    assert math.isfinite(result["next_loss"])


def test_padding_is_not_measured(ranks: RankPool, job: Job) -> None:
    """Every token weighs the same, whatever its step has besides."""
    lengths = [3 + 5 * i % 14 for i in range(6 * 12)]
    padded = replace(job, lengths=lengths)
    result = ranks.run(2, quality_settings.compensate_once, padded, HEADS, CHANNELS)[0]
    assert result["tokens"] == [sum(lengths[:12]), sum(lengths[12:24])]
    for name in result["before"]:
        if int(name[0]) in quality_settings.CUT_LAYERS:
            assert_refitted(result, name, kept_columns(name))


def test_activation_checkpointing_changes_no_refit(ranks: RankPool, job: Job) -> None:
    """A backward pass computes layers again, which are no passes to keep."""
    plain, checkpointed = (
        ranks.run(2, quality_settings.compensate_once, changed, HEADS, CHANNELS)[0]
        for changed in (job, replace(job, gradient_checkpointing=True))
    )
    assert plain["passes"] == checkpointed["passes"]
    for name, layer in plain["after"].items():
        for part, tensor in layer.items():
            assert torch.equal(tensor, checkpointed["after"][name][part]), name


def test_whole_runs_agree_on_any_number_of_ranks(ranks: RankPool, job: Job) -> None:
    """Keeps passes across several cuts. fp32 sums are in another order, as in test_sharded_equals_dense."""
    alone = replace(job, deepspeed=None)
    first = ranks.run(1, train, alone)[0]
    on_three = ranks.run(3, train, job)[0]
    uncompensated = {
        key: value for key, value in job.prune.items() if not key.startswith("compensate")
    }
    plain = ranks.run(1, train, replace(alone, prune=uncompensated))[0]
    assert len(first.cut_steps) >= 2
    assert abs(first.losses[-1] - plain.losses[-1]) > 1e-3, "the refit must have an effect"
    assert on_three.kept == first.kept
    for name, weight in first.frozen.items():
        assert (on_three.frozen[name] - weight).abs().max() < TOLERANCE, name
    assert on_three.losses == pytest.approx(first.losses, abs=TOLERANCE)
