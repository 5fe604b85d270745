"""The one file that knows lm-eval's model class; import it only where lm-eval is installed."""

import importlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM  # untyped where lm-eval is not installed


class RankedLM(HFLM):
    """lm-eval's Hugging Face model around one that is loaded already, on one of several ranks.

    lm-eval itself shares documents out only under `accelerate launch`; the rest of what it needs for that is
    torch.distributed.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, rank: int, world_size: int
    ) -> None:
        super().__init__(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size)
        self._rank = rank
        self._world_size = world_size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A scalar of every rank -> (W,)."""
        if self._world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self._world_size)]
        torch.distributed.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def barrier(self) -> None:
        if self._world_size > 1:
            torch.distributed.barrier()
