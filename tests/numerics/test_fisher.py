"""Scores by `fisher` on 1, 2 and 3 ZeRO-3 ranks, against an explicit mask in one dense model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tests.oracle.formula import mask_fisher
from tests.support import quality_settings
from tests.support.driver import Job, dense_twin, first_batch, tiny_job
from tests.support.ranks import RankPool

HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, SAMPLES = 15, 5, 4, 61, 2, 12
# In fp32 against fp64. A sum of squares loses no digits, but a mask's own gradient is a sum whose terms cancel.
TOLERANCE = 1e-5
LENGTHS = [3 + 5 * i % 14 for i in range(SAMPLES)]


def make_job(folder: Path, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Job:
    sizes: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "hidden": 3 * heads,
    }
    sizes |= {"ffn": FFN, "layers": LAYERS, "biases": True}
    prune = {"ratio": 0.2, "criterion": "fisher", "normalize": "none"}
    prune |= {"moving_average": 0.0, "protected_first": 0, "cooldown_fraction": 0.0}
    return tiny_job(folder, prune, steps=1, samples=SAMPLES, model=sizes)


def dense_scores(
    job: Job, heads: int = KV_HEADS, ranges: int = 0, *, distilled: bool = False
) -> list[Tensor]:
    """Returns heads, then channels, layer by layer. `distilled`: half of the loss is the base's divergence."""
    oracle, (ids, labels) = dense_twin(job, dtype=torch.float64), first_batch(job)
    wanted = labels[:, 1:] != -100
    with torch.no_grad(), oracle.model.disable_adapter():  # type: ignore[operator]
        teacher = oracle.model(input_ids=ids, use_cache=False).logits[:, :-1][wanted].log_softmax(1)

    def loss() -> Tensor:
        logits = oracle.model(input_ids=ids, use_cache=False).logits[:, :-1][wanted]
        supervised = cross_entropy(logits, labels[:, 1:][wanted])
        divergence = kl_div(logits.log_softmax(1), teacher, log_target=True, reduction="batchmean")
        return (supervised + divergence) / 2 if distilled else supervised

    inputs = (("self_attn.o_proj", heads, ranges), ("mlp.down_proj", FFN, 0))
    return mask_fisher(
        loss, [(oracle._wrapper(i, name), n, own) for i in range(LAYERS) for name, n, own in inputs]
    )


def assert_equal(result: dict[str, Any], expected: list[Tensor]) -> None:
    found = [scores for pair in result["scores"] for scores in pair]
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert ((a - b).abs() / (b.abs() if b.ndim == 1 else b.abs().max())).max() < TOLERANCE


@pytest.mark.parametrize(
    ("world_size", "micro", "checkpointing", "lengths", "offload", "heads"),
    [
        (1, 12, False, None, "", ()),
        (2, 2, True, LENGTHS, "_offload", ()),
        (3, 2, False, None, "_offload_optimizer", ()),
        (3, 1, True, LENGTHS, "", ()),
        (2, 2, False, LENGTHS, "", (10, 2)),  # second moments of query heads
    ],
)
def test_scores_are_those_of_an_explicit_mask(
    ranks: RankPool, tmp_path: Path, world_size: int, micro: int, checkpointing: bool, lengths: Any, offload: str,
    heads: tuple[int, ...],
) -> None:  # fmt: skip
    changes = {
        "micro_batch_size": micro,
        "gradient_checkpointing": checkpointing,
        "lengths": lengths,
    }
    job = replace(
        make_job(tmp_path, *heads), **changes, deepspeed=f"ds_configs/zero3{offload}.json"
    )
    expected = dense_scores(job, *heads)
    for result in ranks.run(world_size, quality_settings.fisher_scores, job):
        assert_equal(result, expected)
        of_heads = 2 * 5**2 if heads else KV_HEADS
        # one fp64 number per score
        assert result["sent"] == [8 * LAYERS * (of_heads + FFN) * (world_size > 1)]


def test_scores_of_a_distilled_loss_are_those_of_an_explicit_mask(
    ranks: RankPool, tmp_path: Path
) -> None:
    changed = replace(make_job(tmp_path), gradient_checkpointing=True, lengths=LENGTHS)
    expected = dense_scores(changed, distilled=True)
    for result in ranks.run(
        2, quality_settings.fisher_scores, replace(changed, distill_weight=0.5)
    ):
        assert_equal(result, expected)
