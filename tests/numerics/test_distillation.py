"""Distillation on 1, 2 and 3 ZeRO-3 ranks, against autograd on one dense model and all of its teacher's logits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import quality_settings
from tests.support.driver import Job, dense_twin, first_batch, tiny_job
from tests.support.ranks import RankPool

WEIGHT, STEPS, SAMPLES = 0.5, 2, 12
# In fp32 against fp64. The loss is about 5, whose last bit is 5e-7; gradients reach 0.3.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("distillation")
    sizes = {"heads": 25, "kv_heads": 5, "head_dim": 4, "hidden": 25, "ffn": 61, "biases": True}
    return tiny_job(
        folder, {"ratio": 0.2, "warmup_fraction": 0.0}, steps=STEPS, samples=SAMPLES, model=sizes
    )


def dense_step(job: Job, temperature: float) -> tuple[float, dict[str, Tensor]]:
    """Returns loss and LoRA gradients of the first batch. The teacher is the same model without its adapter."""
    oracle, (input_ids, labels) = dense_twin(job, dtype=torch.float64), first_batch(job)
    with torch.no_grad(), oracle.model.disable_adapter():  # type: ignore[operator]
        theirs = oracle.model(input_ids=input_ids, use_cache=False).logits
    ours = oracle.model(input_ids=input_ids, use_cache=False).logits
    wanted = labels[:, 1:] != -100
    cross_entropy = F.cross_entropy(ours[:, :-1][wanted], labels[:, 1:][wanted], reduction="sum")
    student, teacher = (
        (logits[:, :-1][wanted] / temperature).log_softmax(1) for logits in (ours, theirs)
    )
    divergence = (teacher.exp() * (teacher - student)).sum()
    loss = ((1 - WEIGHT) * cross_entropy + WEIGHT * temperature**2 * divergence) / wanted.sum()
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in oracle.copies.items()
        if parameter.grad is not None
    }
    return float(loss.detach()), gradients


LENGTHS = [3 + 5 * i % 14 for i in range(STEPS * SAMPLES)]


@pytest.mark.parametrize(
    ("temperature", "checkpointing", "lengths"), [(1, True, None), (2, False, LENGTHS)]
)
def test_loss_and_gradients_are_the_dense_ones(
    ranks: RankPool, job: Job, temperature: float, checkpointing: bool, lengths: list[int] | None
) -> None:
    """Takes samples of one length and of different ones. Nothing is learned from padding."""
    changed = replace(job, gradient_checkpointing=checkpointing, lengths=lengths)
    loss, gradients = dense_step(changed, temperature)
    distilled = replace(changed, distill_weight=WEIGHT, distill_temperature=temperature)
    for world_size in (1, 2, 3):
        found = ranks.run(world_size, quality_settings.first_pass, distilled)[0]
        assert abs(found["loss"] - loss) < TOLERANCE
        assert set(found["gradients"]) == set(gradients)
        for name, gradient in gradients.items():
            assert (found["gradients"][name] - gradient).abs().max() < TOLERANCE, name
