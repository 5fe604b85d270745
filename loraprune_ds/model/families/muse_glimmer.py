"""Muse-Glimmer, and a class for its text part with a head. transformers only has the class with the tower."""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from loraprune_ds.model.families.base import Marks
from loraprune_ds.model.families.blocks import head_spans, rows
from loraprune_ds.model.families.llama import Llama


class MuseGlimmer(Llama):
    """Each input of o_proj has a gate. The class requires hidden_size to be a multiple of the query heads."""

    def layer(self, c: Any, i: int) -> Marks:
        queries, _ = head_spans(c)
        yield from super().layer(c, i)
        yield rows("self_attn.gate_proj", queries)

    def lm_class(self) -> Any:
        return _lm_class()


@cache
def _lm_class() -> Any:
    # These take a second to import, and older versions of transformers lack them.
    from transformers import MuseGlimmerTextConfig
    from transformers.modeling_utils import slice_logits_to_keep
    from transformers.models.muse_glimmer.modeling_muse_glimmer import (
        MuseGlimmerPreTrainedModel,
        MuseGlimmerTextModel,
    )

    class MuseGlimmerForCausalLM(MuseGlimmerPreTrainedModel, GenerationMixin):
        config: MuseGlimmerTextConfig
        _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = MuseGlimmerTextModel(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self, input_ids: Any = None, labels: Any = None, logits_to_keep: Any = 0, **inputs: Any
        ) -> Any:
            outputs = self.model(input_ids, **inputs)
            hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
            cap = self.config.final_logit_softcapping
            logits = torch.tanh(self.lm_head(hidden) * self.config.output_multiplier / cap) * cap
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size)
            return CausalLMOutputWithPast(
                loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions
            )

    return MuseGlimmerForCausalLM
