"""A Mistral whose layers differ in attention heads and MLP width. Structured pruning leaves such a model.

config.json has the sizes of each layer in transformers' own form. It parses that from 5.16 on. 4.x has a plain dict.
    "per_layer_config": {"0": {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1301}, ...}
A size that a layer does not name is the global one. This file needs nothing but torch and transformers:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import copy

from torch import nn
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)


class PrunedMistralConfig(MistralConfig):
    model_type = "pruned_mistral"
    # In transformers 5 code that knows one size for all layers reads the global one. Else it would raise.
    allow_global_per_layer_attribute_access = True  # pyright: ignore[reportAssignmentType]


def layer_config(config: MistralConfig, layer: int) -> MistralConfig:
    """Returns the config with the sizes of one layer."""
    per_layer = getattr(config, "per_layer_config", None)
    if per_layer is None:
        return config
    if not isinstance(per_layer, dict):  # transformers 5 resolves the sizes itself
        return per_layer[layer]
    resolved = copy.copy(config)
    for index, sizes in per_layer.items():
        if int(index) == layer:
            resolved.__dict__.update(sizes)
    return resolved


class PrunedMistralModel(MistralModel):
    config_class = PrunedMistralConfig

    def __init__(self, config: MistralConfig) -> None:
        # Past MistralModel's own, which would build every layer at the global size first.
        super(MistralModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [MistralDecoderLayer(layer_config(config, i), i) for i in range(config.num_hidden_layers)]
        for layer in layers:
            layer.self_attn.config = config  # so that set_attn_implementation() on the model still reaches every layer
        self.layers = nn.ModuleList(layers)
        self.norm = MistralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedMistralForCausalLM(MistralForCausalLM):
    config_class = PrunedMistralConfig

    def __init__(self, config: MistralConfig) -> None:
        super(MistralForCausalLM, self).__init__(config)  # past its own, for the same reason
        self.model = PrunedMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
