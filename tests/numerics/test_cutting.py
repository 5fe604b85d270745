"""One scoring and one cut, looked at closely: results, traffic, carried state, freed memory."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.ranks.flat import GATHERED_NUMEL, partition_numel
from tests.oracle.formula import group_scores
from tests.support import cutting
from tests.support.driver import Job, equal_scores, tiny_job
from tests.support.families import LLAMA_LINEARS
from tests.support.ranks import RankPool

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN = 6, 3, 8, 42, 61
# elements at rank 4
LAYER_LORA = 4 * ((2 * HEADS + 2 * KV_HEADS) * HEAD_DIM + 3 * FFN + 7 * HIDDEN)
KEPT_HEADS, KEPT_CHANNELS = [0, 2], [c for c in range(FFN) if c % 3]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("cutting")
    sizes = {
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden": HIDDEN,
        "ffn": FFN,
    }
    sizes |= {"layers": 4, "biases": True}
    prune = {"ratio": 0.2, "prune_every": 1}
    return tiny_job(folder, prune, steps=4, samples=6, tokens=12, model=sizes, micro_batch_size=1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_scores_of_shards_are_scores_of_the_whole(
    ranks: RankPool, job: Job, world_size: int
) -> None:
    found = ranks.run(world_size, cutting.score_shards_and_whole, job)
    # The oracle scores the gathered W from the same fp32 gradients in fp64. What is left is one fp32 rounding of each
    # element and of short sums. That is below 1e-6 of a sum of positive terms.
    assert worst_difference(found[0]) < 1e-6
    assert all(equal_scores(other["scores"], found[0]["scores"]) for other in found[1:])


def worst_difference(result: dict) -> float:
    worst = 0.0
    for scores, weights, factors in zip(
        result["scores"], result["weights"], result["factors"], strict=True
    ):
        layer = {name: (weights[name], *factors[name][:4]) for name in weights}
        scaling = factors["mlp.up_proj"][4]
        expected = group_scores(
            layer, scaling, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM, normalize=False
        )
        worst = max(
            worst,
            *(
                float(((a - b).abs() / b.abs()).max())
                for a, b in zip(scores, expected, strict=True)
            ),
        )
    return worst


def test_a_corrupted_shard_shows_in_the_scores(ranks: RankPool, job: Job) -> None:
    assert worst_difference(ranks.run(3, cutting.score_shards_and_whole, job, True)[0]) > 1e-4


@pytest.mark.parametrize(
    ("world_size", "at_once", "rounds"),
    [(2, GATHERED_NUMEL, 1), (3, GATHERED_NUMEL, 1), (2, 1, 4), (2, 2 * 2 * LAYER_LORA, 2)],
)
def test_scoring_gathers_lora_alone(
    ranks: RankPool, job: Job, world_size: int, at_once: int, rounds: int
) -> None:
    for result in ranks.run(world_size, cutting.score_shards_and_whole, job, False, at_once):
        gathers = [n for name, n in result["calls"] if name == "all_gather_into_tensor"]
        reduces = [n for name, n in result["calls"] if name == "all_reduce"]
        assert {name for name, _ in result["calls"]} == {"all_gather_into_tensor", "all_reduce"}
        assert sum(gathers) == 2 * result["lora_shards"]  # masters and gradients, nothing else
        # of four layers, a round takes those that fit, and at least one
        assert len(gathers) == rounds
        assert reduces == [4 * (4 * KV_HEADS + 3 * FFN)]  # every module's groups, once


@pytest.mark.parametrize(
    ("world_size", "dtype"), [(1, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")]
)
def test_a_cut_carries_everything_bit_by_bit(
    ranks: RankPool, job: Job, world_size: int, dtype: Any
) -> None:
    """It sends the elements that change owner. The old shards and buffers are freed."""
    results = ranks.run(
        world_size, cutting.cut_once, replace(job, dtype=dtype), KEPT_HEADS, KEPT_CHANNELS
    )
    before, after = results[0]["before"], results[0]["after"]
    # per cut layer: 7 weights, 5 biases, 7 LoRA factors. These have copy, master and two moments
    assert count_sliced(results[0]) == 2 * (7 + 5 + 7 * 4)
    assert results[0]["engine_steps"][0] == 2
    assert [r["alive"] for r in results] == [0] * world_size
    if world_size > 1:
        assert all(r["next_loss"] == results[0]["next_loss"] for r in results)
        carried = {n: t for n, t in before.items() if after[n].shape != t.shape}
        expected_bytes = sum(
            moved(name, t, world_size) * t.element_size() for name, t in carried.items()
        )
        assert {r["sent"] for r in results} == {expected_bytes}
        # two per layer that is cut
        assert [name for name, _ in results[0]["calls"]] == ["all_to_all_single"] * 2 * 2


def test_lora_in_another_dtype_than_the_base_keeps_it(ranks: RankPool, job: Job) -> None:
    """Other trainers leave LoRA in fp32 on a bf16 base. One buffer for both would make all of it fp32."""
    mixed = replace(job, dtype="bfloat16")
    results = ranks.run(3, cutting.cut_once_with_fp32_lora, mixed, KEPT_HEADS, KEPT_CHANNELS)
    assert {tensor.dtype for tensor in results[0]["before"].values()} == {
        torch.float32,
        torch.bfloat16,
    }
    assert count_sliced(results[0])
    assert math.isfinite(results[0]["next_loss"])


@pytest.mark.parametrize(
    ("heads", "channels", "tensors"),
    [
        # per cut layer: 4 or 3 weights and their cut biases. Each has a LoRA factor with copy and state
        pytest.param(KEPT_HEADS, list(range(FFN)), 2 * (4 + 3 + 4 * 4), id="heads"),
        pytest.param(list(range(KV_HEADS)), KEPT_CHANNELS, 2 * (3 + 2 + 3 * 4), id="channels"),
        pytest.param(list(range(KV_HEADS)), list(range(FFN)), 0, id="nothing"),
    ],
)
def test_what_stays_is_not_sent(
    ranks: RankPool, job: Job, heads: list[int], channels: list[int], tensors: int
) -> None:
    """Late cuts of a long schedule take channels alone, or nothing."""
    results = ranks.run(2, cutting.cut_once, replace(job, dtype="bfloat16"), heads, channels)
    assert count_sliced(results[0], heads, channels) == tensors
    calls = [elements for name, elements in results[0]["calls"] if name == "all_to_all_single"]
    assert len(calls) == (4 if tensors else 0)
    kind = "heads" if len(heads) < KV_HEADS else "channels"
    linears = [linear.name for linear in LLAMA_LINEARS if linear.kind == kind]
    of_this_kind = [
        n
        for n in results[0]["before"]
        if ".layers.1." in n and any(linear in n for linear in linears)
    ]
    most = sum(results[0]["before"][name].numel() for name in of_this_kind)
    assert sum(calls) < 2 * most  # two layers, and nothing of the other kind


def count_sliced(result: dict, *kept: list[int]) -> int:
    """Checks that every tensor is what `sliced` leaves of it, bit by bit. Returns how many have become smaller."""
    assert set(result["before"]) == set(result["after"])
    expected = {name: sliced(name, tensor, *kept) for name, tensor in result["before"].items()}
    for name, tensor in result["after"].items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    return sum(tensor.shape != result["before"][name].shape for name, tensor in expected.items())


def sliced(
    name: str, tensor: Tensor, heads: list[int] = KEPT_HEADS, channels: list[int] = KEPT_CHANNELS
) -> Tensor:
    """Cuts a tensor of this name by plain index_select."""
    layer = name.split(".layers.")[1].split(".")[0] if ".layers." in name else ""
    linear = next((x for x in LLAMA_LINEARS if x.name in name), None)
    if layer not in ("1", "2") or linear is None:
        return tensor
    if ("lora_A" in name and linear.axis == 0) or ("lora_B" in name and linear.axis == 1):
        return tensor
    if name.endswith("bias") and linear.axis == 1:
        return tensor
    groups = heads if linear.kind == "heads" else channels
    width = (
        1 if linear.kind == "channels" else HEAD_DIM * (HEADS // KV_HEADS if linear.queries else 1)
    )
    rows = torch.tensor([g * width + j for g in groups for j in range(width)])
    return tensor.index_select(linear.axis if tensor.dim() == 2 else 0, rows)


def moved(name: str, tensor: Tensor, world_size: int) -> int:
    """Counts the elements whose owner differs before and after, one by one."""
    positions = torch.arange(tensor.numel()).view(tensor.shape)
    old = sliced(name, positions).reshape(-1) // partition_numel(tensor.numel(), world_size)
    new = torch.arange(len(old)) // partition_numel(len(old), world_size)
    return int((old != new).sum())


def test_a_cut_gives_the_pinned_memory_of_a_layer_back_before_the_next_one(
    ranks: RankPool, job: Job
) -> None:
    """Counts after each layer, of which the middle ones are cut, and at the end."""
    alive = ranks.run(
        2,
        cutting.shards_at_each_emptying,
        replace(job, dtype="bfloat16"),
        KEPT_HEADS,
        KEPT_CHANNELS,
    )
    layers = len(alive[0]) - 1
    assert alive == [[14, 7, *[0] * (layers - 1)]] * 2


def test_bf16_masks_are_the_same_on_any_number_of_ranks(ranks: RankPool, job: Job) -> None:
    """Starts from the same saved weights and gradients. In bf16 gradients differ between numbers of ranks."""
    bf16 = replace(job, dtype="bfloat16")
    first = ranks.run(1, cutting.masks_from_saved_gradients, bf16, None)[0]
    for world_size in (1, 2, 3):
        for result in ranks.run(
            world_size, cutting.masks_from_saved_gradients, bf16, first["gradients"]
        ):
            assert result["masks"] == first["masks"]


def test_a_rank_with_another_mask_ends_the_run_everywhere(ranks: RankPool, job: Job) -> None:
    messages = ranks.run(3, cutting.disagree, job)
    message = (
        "step 1: rank 2 computed another mask than rank 0; check the hardware of that rank, "
        "then resume from the last checkpoint"
    )
    assert messages == [message] * 3


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "step 1: the loss is nan on rank 0; the weights of layer 2 are not finite"),
        ("gradient", "step 1: the LoRA gradient of layer 2 is not finite"),
        ("score", "step 1: the score of layer 1 self_attn.q_proj is not finite"),
    ],
)
def test_a_number_that_is_not_finite_is_named_on_all_ranks(
    ranks: RankPool, job: Job, where: str, message: str
) -> None:
    messages = ranks.run(2, cutting.poisoned, job, where)
    assert len(messages) == 2
    assert all(each.startswith(message) for each in messages)
