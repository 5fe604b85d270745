"""A Llama whose layers differ in attention heads and MLP width. Structured pruning leaves such a model.

config.json has the sizes of each layer in transformers' own form. It parses that from 5.16 on. 4.x has a plain dict.
    "per_layer_config": {"0": {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1301}, ...}
A size that a layer does not name is the global one. This file needs nothing but torch and transformers:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
"""

import copy

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)


class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"
    # In transformers 5 code that knows one size for all layers reads the global one. Else it would raise.
    allow_global_per_layer_attribute_access = True  # pyright: ignore[reportAssignmentType]

    def validate(self) -> None:
        """Does nothing. transformers 5 runs it on saving, and a stock Llama's head count must then divide hidden_size.

        head_dim is explicit here, so any head count will do.
        """


def layer_config(config: LlamaConfig, layer: int) -> LlamaConfig:
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


class PrunedLlamaModel(LlamaModel):
    config_class = PrunedLlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        # Past LlamaModel's own, which would build every layer at the global size first.
        super(LlamaModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = [LlamaDecoderLayer(layer_config(config, i), i) for i in range(config.num_hidden_layers)]
        for layer in layers:
            layer.self_attn.config = config  # so that set_attn_implementation() on the model still reaches every layer
        self.layers = nn.ModuleList(layers)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # past its own, for the same reason
        self.model = PrunedLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
