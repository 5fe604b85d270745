"""The dense model as a second, frozen copy on the same ranks: the teacher of distillation."""

from typing import Any

import torch

from loraprune_ds.config import ModelConfig, TrainConfig
from loraprune_ds.model.logits import Distillation
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.zero.engine import build_inference_engine
from loraprune_ds.zero.training_engine import release


class Teacher:
    """Holds the source's decoder in a separate engine, sharded, stored as `model.frozen` says, in evaluation mode.

    It has no LoRA, is never scored, cut or saved, and draws no random numbers. It needs no head, since the
    student's is never cut.
    """

    def __init__(
        self, pretrained: PretrainedModel, model: ModelConfig, train: TrainConfig, ds_config: dict[str, Any]
    ) -> None:
        self.engine = build_inference_engine(pretrained, model.attn_implementation, model.dtype, ds_config, head=False)
        self._weight, self._temperature = train.distill_weight, train.distill_temperature

    @torch.no_grad()
    def distillation(self, inputs: dict[str, Any]) -> Distillation:
        """Makes one forward pass. Returns the final hidden states of the supervised tokens. Collective."""
        positions = inputs.get("position_ids")
        decoded = self.engine(input_ids=inputs["input_ids"], position_ids=positions, use_cache=False)
        rows = decoded.last_hidden_state.flatten(0, 1).index_select(0, inputs["supervised"])
        return Distillation(rows, self._weight, self._temperature)

    def release(self) -> None:
        release(self.engine)
