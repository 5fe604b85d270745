"""What a run can change that the product has no setting for. peer_run.py installs it, quality.py measures it.

norms          the norms of all layers train, too
temperature-2  KL(teacher ‖ student) of logits divided by 2, times 4 (Hinton et al., arXiv 1503.02531)
"""

from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from loraprune_ds.model import distillation
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.distillation import Distillation, HiddenTeacher
from loraprune_ds.model.logits import Head
from loraprune_ds.zero import engine


def with_norms(*given: Any) -> PeftModel:
    """Does what add_lora does. Then norms are trained like LoRA."""
    model = add_lora(*given)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_()
    return model


def softened(
    temperature: float,
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    distillation: Distillation,
    rows: slice,
    gradient: Tensor | None,
) -> Tensor:
    """Stands in for `_chunk_losses` of model/distillation.py, for teachers of hidden states and heads without a cap."""
    assert isinstance(distillation.teacher, HiddenTeacher)
    assert head.transform.softcap is None
    w = distillation.weight
    logits = head.logits(hidden).float()
    expected = (head.logits(distillation.teacher.hidden[rows]).float() / temperature).log_softmax(1)
    soft, log_probs = (logits / temperature).log_softmax(1), logits.log_softmax(1)
    divergence = temperature**2 * (expected.exp() * (expected - soft)).sum(1)
    losses = w * divergence - (1 - w) * log_probs.gather(1, labels)[:, 0]
    if gradient is not None:
        slope = log_probs.exp_().scatter_add_(1, labels, torch.full_like(log_probs[:, :1], -1)).mul_(1 - w)
        slope += w * temperature * (soft.exp_() - expected.exp_())
        gradient.copy_(slope.to(head.weight.dtype) @ head.weight)
    return losses


def install(name: str) -> None:
    """Changes the product in this process."""
    if name == "norms":
        cast(Any, engine).add_lora = with_norms
    else:
        cast(Any, distillation)._chunk_losses = partial(softened, float(name.rpartition("-")[2]))


LEVERS = ("norms", "temperature-2")
