"""Scores by the true gradient of W on 1, 2 and 3 ZeRO-3 ranks, against autograd on one dense (PEFT) model."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraprune_ds.config import LoraConfig
from loraprune_ds.export.lora import _adapter_config
from loraprune_ds.model.pretrained import open_pretrained
from tests.families import MIXTURES, families, tiny_model
from tests.numerics import quality_settings
from tests.numerics.driver import Job, dense_twin, equal_scores, family_job, tiny_job
from tests.numerics.test_families import FACTOR, FLOOR
from tests.oracle.dense_trainer import CHANNEL_LINEARS, HEAD_LINEARS, INPUT_SHRINKS
from tests.ranks import RankPool

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 25, 5, 4, 25, 61, 3  # MLP weights do not divide by 2 or 3
PRUNE = {"ratio": 0.2, "criterion": "gradient", "normalize": "none", "moving_average": 0.0, "warmup_fraction": 0.5}
# Both sides compute gradients and sums of fp32 numbers, in another order. The scores are sums of positive terms.
TOLERANCE = 1e-5
# A sum over ranks is rounded to bf16, by at most 2^-9 of itself, once for each rank that joins. A score adds up
# hundreds of such numbers, whose errors mostly cancel.
BF16_TOLERANCE = 2.0**-9


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("gradient")
    sizes: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden": HIDDEN, "ffn": FFN}
    sizes |= {"layers": LAYERS, "biases": True}
    return tiny_job(folder, PRUNE, steps=6, model=sizes)


def dense_scores(job: Job) -> list[tuple[Tensor, Tensor]]:
    """Returns (heads, channels) of every layer by autograd on whole weights, element by element in fp64."""
    oracle = dense_twin(job)
    wrappers = {(i, n): oracle._wrapper(i, n) for i in range(LAYERS) for n in HEAD_LINEARS + CHANNEL_LINEARS}
    for wrapper in wrappers.values():
        wrapper.base_layer.weight.requires_grad_(True)
    for part in oracle._partial_losses(job.batches[0]):
        part.backward()
    return [(_sum(wrappers, i, HEAD_LINEARS, KV_HEADS), _sum(wrappers, i, CHANNEL_LINEARS, FFN)) for i in range(LAYERS)]


def _sum(wrappers: dict[tuple[int, str], Any], layer: int, linears: tuple[str, ...], groups: int) -> Tensor:
    total = torch.zeros(groups, dtype=torch.float64)
    for linear in linears:
        wrapper = wrappers[layer, linear]
        weight = wrapper.base_layer.weight
        a, b = (factors["default"].weight.detach().double() for factors in (wrapper.lora_A, wrapper.lora_B))
        assert weight.grad is not None
        importance = (weight.grad.double() * (weight.detach().double() + wrapper.scaling["default"] * b @ a)).abs()
        total += importance.sum(0 if linear in INPUT_SHRINKS else 1).view(groups, -1).sum(1)
    return total


@pytest.mark.parametrize(("world_size", "micro", "checkpointing"), [(1, 12, False), (2, 2, True), (3, 4, False)])
def test_scores_are_those_of_autograd(
    ranks: RankPool, job: Job, world_size: int, micro: int, checkpointing: bool
) -> None:
    changed = replace(job, micro_batch_size=micro, gradient_checkpointing=checkpointing)
    results = ranks.run(world_size, quality_settings.gradient_scores, changed)
    result = results[0]
    for found, expected in zip(result["scores"], dense_scores(job), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert ((a - b).abs() / b.abs()).max() < TOLERANCE
    numels = [HIDDEN * n for n in (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, FFN)]
    micro_batches = 2 * 12 // (micro * world_size)  # of both steps
    assert set(result["whole"]) == set(numels)  # never more than one linear
    assert len(result["whole"]) == 7 * LAYERS * micro_batches
    linear_numel = LAYERS * (2 * numels[0] + 2 * numels[1] + 3 * numels[2])
    for other in results:
        assert linear_numel / world_size <= other["shards"][0] <= linear_numel / world_size + 7 * LAYERS
        assert other["left"] == 0
        assert equal_scores(other["scores"], result["scores"])


def scores_of_merged(job: Job, family: str, dtype: torch.dtype) -> Tensor:
    """Returns the scores of all groups, layer by layer, from gradients of the stock model with merged weights."""
    shape = open_pretrained(job.folder).shape
    loaded = PeftModel.from_pretrained(tiny_model(family, seed=1), str(job.adapter))
    model: Any = loaded.merge_and_unload().to(dtype)  # type: ignore[operator]
    model.requires_grad_(True)
    ids, targets = job.batches[0]
    predictions = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    cross_entropy(predictions, targets[:, 1:].flatten()).backward()
    named, scores = dict(model.named_parameters()), list[Tensor]()
    for i, layer in enumerate(shape.layers):
        total = {kind: torch.zeros(layer[kind], dtype=torch.float64) for kind in shape.kinds}
        for linear in shape.linears(i):
            weight = named[f"model.layers.{i}.{linear.name}{'_proj' if linear.is_stack else '.weight'}"]
            assert weight.grad is not None
            importance = (weight * weight.grad).abs().double()
            if linear.is_stack:
                total["experts"] += importance.sum((1, 2))
            else:
                sums = importance.sum(1 - linear.axis).split(shape.part_sizes(i, linear.parts))
                for part, of_part in zip(linear.parts, sums, strict=True):
                    total[part.kind] += of_part.view(-1, shape.width(part.width)).sum(1)
        scores += total.values()
    return torch.cat(scores).detach()


@pytest.mark.parametrize("family", families("mixtral", "gpt_oss", of=MIXTURES))
def test_experts_have_the_scores_of_autograd(ranks: RankPool, tmp_path: Path, family: str) -> None:
    """Their blocks have as many tokens as chose them. The stack of all is reduce-scattered at once."""
    world_size = {"mixtral": 3, "gpt_oss": 2}.get(family, 1)
    experts, _ = family_job(tmp_path, family, PRUNE | {"protected_first": 0, "protected_last": 0}, steps=4)
    shape = open_pretrained(experts.folder).shape
    config = _adapter_config(LoraConfig(r=4, lora_alpha=8), shape)
    (experts.adapter / "adapter_config.json").write_text(json.dumps(config))
    results = ranks.run(world_size, quality_settings.gradient_scores, experts)
    found = torch.cat([scores for layer in results[0]["scores"] for scores in layer])
    exact, rounded = (scores_of_merged(experts, family, dtype) for dtype in (torch.float64, torch.float32))
    error = FACTOR * (rounded - exact).abs().max() + FLOOR * exact.max()
    assert error < 1e-4 * exact.max()  # another gradient shows by more than that
    assert (found - exact).abs().max() < error
    sizes = [math.prod(shape.linear_shape(i, linear)) for i, linear in shape.linear_ids()]
    assert sorted(results[0]["whole"]) == sorted(sizes * (len(results[0]["whole"]) // len(sizes)))


@pytest.mark.parametrize("world_size", [2, 3])
def test_bf16_sends_half_and_hardly_changes_a_score(ranks: RankPool, job: Job, world_size: int) -> None:
    half = replace(job, dtype="bfloat16")
    found = ranks.run(world_size, quality_settings.gradient_scores, half)[0]
    widened = ranks.run(world_size, partial(quality_settings.gradient_scores, widen=True), half)[0]
    assert 2 * found["sent"] == widened["sent"] > 0
    a, b = (torch.cat([scores for layer in result["scores"] for scores in layer]) for result in (found, widened))
    assert 0 < ((a - b).abs() / b).max() < BF16_TOLERANCE


def test_training_does_not_notice(ranks: RankPool, job: Job) -> None:
    with_gradients = ranks.run(2, quality_settings.gradient_scores, job)[0]["lora"]
    without = ranks.run(2, quality_settings.lora_after_two_steps, replace(job, prune={"ratio": 0.2}))[0]
    assert all(torch.equal(with_gradients[name], without[name]) for name in without)


def test_only_every_kth_step_pays(ranks: RankPool, job: Job) -> None:
    sparse = replace(job, prune=job.prune | {"score_every": 2})
    result = ranks.run(2, quality_settings.gradient_scores, sparse)[0]
    assert result["shards"][0] > 0
    assert result["shards"][1] == 0
    assert len(result["whole"]) == 7 * LAYERS * 3  # the three micro-batches of step 1
