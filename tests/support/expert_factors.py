"""LoRA factors of a stack of experts."""

import torch

from loraprune_ds.model.family import FAMILIES
from loraprune_ds.pruning.prunable_model import LoraFactors

KINDS = tuple(name for name, family in FAMILIES.items() if family.has_experts)
# sums in another order, some 1e-7 each; a wrong expert moves the logits by about 1
TOLERANCE = 1e-5


def factors(experts: int, rows: int, columns: int, r: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(4)
    sizes = ((experts * r, columns), (experts * rows, r)) * 2
    return LoraFactors(*(torch.randn(size, generator=generator) for size in sizes), scaling=2.0)
