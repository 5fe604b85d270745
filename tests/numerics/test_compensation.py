"""The refit after a cut, on 1, 2 and 3 ZeRO-3 ranks, against torch.linalg.lstsq on the same activations."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.plan.refits import moment_bytes
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.compensate import measured_linears
from tests.support import quality_settings
from tests.support.driver import Job, family_job, tiny_job, train
from tests.support.ranks import RankPool

# MLP weights do not divide by 2 or 3
LAYERS, KV_HEADS, QUERIES, HEAD_DIM, HIDDEN, FFN = 5, 5, 5, 4, 25, 61
HEADS, CHANNELS = [0, 2, 3], [c for c in range(FFN) if c % 3]
RIDGE, DECAY, SCALING = 0.05, 0.5, 2.0
# The refit is solved in fp64 from moments that are summed in fp32. Their rounding is 1e-7. It grows by the condition
# number of C[K, K] + ridge, which is below 100 for these activations.
TOLERANCE = 1e-5
OPEN = range(1, LAYERS - 1)  # the first layer and the last are protected, and not measured


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
    prune = {"ratio": 0.2, "prune_every": 1, "warmup_fraction": 0.5, "compensate": "least_squares"}
    # from the first step: the first cut follows the fourth
    prune |= {"compensate_steps": 4, "compensate_decay": 0.5}
    return tiny_job(folder, prune, steps=6, model=sizes)


def kept_columns(name: str) -> list[int]:
    width = QUERIES * HEAD_DIM
    return CHANNELS if "mlp" in name else [h * width + j for h in HEADS for j in range(width)]


def weighted_inputs(result: dict[str, Any], name: str) -> Tensor:
    """Returns (tokens of both steps, in_features) fp64, such that the moving average is their second moment."""
    first, second = (step[name].double() for step in result["steps"])
    return torch.cat(
        [first * math.sqrt(DECAY / len(first)), second * math.sqrt((1 - DECAY) / len(second))]
    )


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


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_refit_is_the_dense_least_squares_solution(
    ranks: RankPool, job: Job, world_size: int
) -> None:
    results = ranks.run(world_size, quality_settings.compensate_once, job, HEADS, CHANNELS)
    result = results[0]
    for name, layer in result["before"].items():
        after, kept, inputs = (
            result["after"][name],
            kept_columns(name),
            weighted_inputs(result, name),
        )
        assert len(inputs) == 2 * 12 * 16  # every token of both global batches, once
        assert all(torch.equal(layer[n], result["untouched"][name][n]) for n in layer), (
            f"{name}: nothing was removed"
        )
        if int(name[0]) not in quality_settings.CUT_LAYERS:
            assert torch.equal(layer["base_layer"], after["base_layer"]), name
            continue
        expected = dense_refit(inputs, layer, kept)
        assert (after["base_layer"][:, kept] - expected).abs().max() < TOLERANCE, name
        assert (after["base_layer"] - layer["base_layer"])[
            :, kept
        ].abs().max() > 1000 * TOLERANCE, "a refit of nothing"
        assert all(torch.equal(layer[n], after[n]) for n in layer if n != "base_layer")
        assert own_error(inputs, layer, after, kept) < 0.99 * own_error(
            inputs, layer, layer, kept
        ), name
        # after the cut, on one rank
        (moment,) = (r["moments"][name] for r in results if name in r["moments"])
        wanted = inputs[:, kept].T @ inputs[:, kept]
        assert (moment - wanted).abs().max() < TOLERANCE * wanted.abs().max(), name
    shape = open_pretrained(job.folder).shape
    planned = moment_bytes(measured_linears(shape, OPEN), world_size)
    for rank, other in enumerate(results):  # each layer's moments on one rank
        assert other["moment_bytes"] == planned[rank]
        assert {int(name[0]) for name in other["owned"]} == {
            i for i in OPEN if i % world_size == rank
        }
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
    prune |= {"compensate_steps": 4, "compensate_decay": 0.5}
    mixture, _ = family_job(
        tmp_path, "mixtral", prune, steps=6, model={"num_hidden_layers": LAYERS}
    )
    experts = [e for e in range(23) if e % 4]
    results = ranks.run(2, quality_settings.compensate_once, mixture, HEADS, experts)
    result = results[0]
    assert result["before"].keys() == {f"{i}.self_attn.o_proj" for i in range(LAYERS)}
    for name, layer in result["before"].items():
        after, kept, inputs = (
            result["after"][name],
            [h * 20 + j for h in HEADS for j in range(20)],
            None,
        )
        if int(name[0]) in quality_settings.CUT_LAYERS:
            inputs = weighted_inputs(result, name)
            assert (
                after["base_layer"][:, kept] - dense_refit(inputs, layer, kept)
            ).abs().max() < TOLERANCE, name
            assert own_error(inputs, layer, after, kept) < 0.99 * own_error(
                inputs, layer, layer, kept
            ), name
        assert (inputs is None) == torch.equal(layer["base_layer"], after["base_layer"])
    shape = open_pretrained(mixture.folder).shape
    planned = moment_bytes(measured_linears(shape, OPEN), 2)
    assert [other["moment_bytes"] for other in results] == planned
    assert math.isfinite(result["next_loss"])


def test_padding_is_not_measured(ranks: RankPool, job: Job) -> None:
    lengths = [3 + 5 * i % 14 for i in range(6 * 12)]
    results = ranks.run(
        2, quality_settings.compensate_once, replace(job, lengths=lengths), HEADS, CHANNELS
    )
    for name in (name for name in results[0]["before"] if int(name[0]) in OPEN):
        steps = [step[name].double() for step in results[0]["steps"]]
        assert [len(step) for step in steps] == [sum(lengths[:12]), sum(lengths[12:24])]
        (moment,) = (r["moments"][name] for r in results if name in r["moments"])
        first, second = (s.T @ s for s in steps)
        tokens = DECAY * len(steps[0]) + (1 - DECAY) * len(steps[1])
        # every token of a step weighs the same
        wanted = (DECAY * first + (1 - DECAY) * second) / tokens
        if int(name[0]) in quality_settings.CUT_LAYERS:
            wanted = wanted[kept_columns(name)][:, kept_columns(name)]
        assert (moment - wanted).abs().max() < TOLERANCE * wanted.abs().max(), name


def test_activation_checkpointing_measures_every_token_once(ranks: RankPool, job: Job) -> None:
    plain, checkpointed = (
        ranks.run(
            2,
            quality_settings.compensate_once,
            replace(job, gradient_checkpointing=on),
            HEADS,
            CHANNELS,
        )[0]
        for on in (False, True)
    )
    assert plain["moments"].keys() == checkpointed["moments"].keys()
    assert all(
        torch.equal(moment, checkpointed["moments"][name])
        for name, moment in plain["moments"].items()
    )


def test_whole_runs_agree_on_any_number_of_ranks(ranks: RankPool, job: Job) -> None:
    """Carries moments across several cuts. fp32 sums are in another order, as in test_sharded_equals_dense."""
    first, *others = (ranks.run(world_size, train, job)[0] for world_size in (1, 3))
    uncompensated = {
        key: value for key, value in job.prune.items() if not key.startswith("compensate")
    }
    plain = ranks.run(1, train, replace(job, prune=uncompensated))[0]
    assert len(first.cut_steps) >= 2
    assert abs(first.losses[-1] - plain.losses[-1]) > 1e-3, "the refit must have an effect"
    for other in others:
        assert other.kept == first.kept
        for name, weight in first.frozen.items():
            assert (other.frozen[name] - weight).abs().max() < TOLERANCE, name
        assert all(abs(a - b) < TOLERANCE for a, b in zip(first.losses, other.losses, strict=True))
