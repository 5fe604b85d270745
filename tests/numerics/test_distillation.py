"""Distillation on 1, 2 and 3 ZeRO-3 ranks, against autograd on one dense model and all of its teacher's logits."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.numerics import quality_settings
from tests.numerics.driver import Job, dense_twin, first_batch, tiny_job
from tests.ranks import RankPool

WEIGHT, STEPS, SAMPLES = 0.5, 2, 12
# In fp32 against fp64. The loss is about 5, whose last bit is 5e-7; gradients reach 0.3.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("distillation")
    sizes = {"heads": 25, "kv_heads": 5, "head_dim": 4, "hidden": 25, "ffn": 61, "biases": True}
    return tiny_job(folder, {"ratio": 0.2, "warmup_fraction": 0.0}, steps=STEPS, samples=SAMPLES, model=sizes)


def dense_step(job: Job, top_k: int | None, temperature: float) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and LoRA gradients of the first batch. The teacher is the same model without its adapter."""
    oracle, (input_ids, labels) = dense_twin(job, dtype=torch.float64), first_batch(job)
    with torch.no_grad(), oracle.model.disable_adapter():  # type: ignore[operator]
        theirs = oracle.model(input_ids=input_ids, use_cache=False).logits
    ours = oracle.model(input_ids=input_ids, use_cache=False).logits
    wanted = labels[:, 1:] != -100
    cross_entropy = F.cross_entropy(ours[:, :-1][wanted], labels[:, 1:][wanted], reduction="sum")
    student, teacher = ((logits[:, :-1][wanted] / temperature).log_softmax(1) for logits in (ours, theirs))
    if top_k is not None:
        top = teacher.topk(top_k, 1).indices
        mask = torch.ones_like(teacher, dtype=torch.bool).scatter_(1, top, False)
        student, teacher = (
            torch.cat([x.gather(1, top), x.masked_fill(~mask, -torch.inf).logsumexp(1, keepdim=True)], 1)
            for x in (student, teacher)
        )
    divergence = (teacher.exp() * (teacher - student)).sum()
    loss = ((1 - WEIGHT) * cross_entropy + WEIGHT * temperature**2 * divergence) / wanted.sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in oracle.copies.items() if parameter.grad is not None}
    return float(loss.detach()), gradients


LENGTHS = [3 + 5 * i % 14 for i in range(STEPS * SAMPLES)]


@pytest.mark.parametrize(
    ("top_k", "temperature", "checkpointing", "lengths"),
    [(None, 1, True, None), (7, 2, False, None), (None, 2, False, LENGTHS)],
)
def test_loss_and_gradients_are_the_dense_ones(
    ranks: RankPool,
    job: Job,
    tmp_path: Path,
    top_k: int | None,
    temperature: float,
    checkpointing: bool,
    lengths: list[int] | None,
) -> None:
    """Takes samples of one length and of different ones. Nothing is learned from padding."""
    changed = replace(job, gradient_checkpointing=checkpointing, lengths=lengths)
    loss, gradients = dense_step(changed, top_k, temperature)
    files = []
    for world_size in (1, 2, 3):
        result = ranks.run(world_size, quality_settings.distilled_step, changed, tmp_path, top_k, temperature)[0]
        live = [ranks.run(world_size, quality_settings.live_step, changed, temperature)[0]] if top_k is None else []
        for found in (result, *live):
            assert abs(found["loss"] - loss) < TOLERANCE
            assert set(found["gradients"]) == set(gradients)
            for name, gradient in gradients.items():
                assert (found["gradients"][name] - gradient).abs().max() < TOLERANCE, name
        assert result["passes"] == [False, True]  # stopped inside the pass, then taken up
        on_disk, planned = result["bytes"]
        assert planned < on_disk < planned + 512 * len(result["files"])  # and each file's header
        files.append(result["files"])
    assert len(files[0]) == -(-STEPS * SAMPLES // quality_settings.FILE_SAMPLES)
    assert files[0] == files[1] == files[2]  # bit by bit
