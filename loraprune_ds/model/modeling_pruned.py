"""A stock language model whose layers differ in attention heads and MLP width, as structured pruning leaves them.

config.json has the sizes of each layer in the form of transformers, which parses it from 5.16 on. 4.x has a plain dict.
    "per_layer_config": {"0": {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1301}, ...}
Layers take other sizes from the global fields. This file needs only torch and transformers:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
A UMT5 has "layer_sizes" for the layers of its encoder, then of its decoder. AutoModelForSeq2SeqLM loads it.
"""

import copy
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
)

FAMILY = "llama"  # the export writes the model_type of the stock model here


def layer_config(config: Any, layer: int, field: str = "per_layer_config") -> Any:
    per_layer = getattr(config, field, None)
    # transformers 5 resolves the sizes itself
    if per_layer is not None and not isinstance(per_layer, dict):
        return per_layer[layer]
    resolved = copy.copy(config)
    for index, sizes in (per_layer or {}).items():
        if int(index) == layer:
            resolved.__dict__.update(sizes)
    return resolved


def rebuild_layers(model: Any, config: Any) -> None:
    """Rebuilds each layer at its own size. from_pretrained does that on the meta device, at no cost."""
    if hasattr(model, "encoder"):
        rebuild_coder(model.encoder, 0)
        rebuild_coder(model.decoder, len(model.encoder.block))
        return
    for i, layer in enumerate(model.layers):
        model.layers[i] = type(layer)(layer_config(config, i), i)


def rebuild_coder(coder: Any, first: int) -> None:
    """Rebuilds the layers of an encoder or decoder. Its first layer is number `first` in "layer_sizes".

    The decoder's attention to the encoder has its own number of heads.
    """
    for i, layer in enumerate(coder.block):
        resolved = layer_config(coder.config, first + i, "layer_sizes")
        rebuilt = type(layer)(resolved, layer_idx=i)
        if coder.is_decoder:
            cross = copy.copy(coder.config)
            cross.num_heads = getattr(resolved, "num_cross_heads", resolved.num_heads)
            rebuilt.layer[1] = type(layer.layer[1])(cross, layer_idx=i)
        coder.block[i] = rebuilt


def pruned_classes(family: str) -> tuple[Any, Any, Any]:
    """Derives the config, the model without its head and the language model of a family from its stock classes."""
    base_config: Any = CONFIG_MAPPING[family]
    base_model: Any = MODEL_MAPPING[base_config]
    language_models: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    is_seq2seq = base_config in language_models
    if not is_seq2seq:
        language_models = MODEL_FOR_CAUSAL_LM_MAPPING
    base_lm: Any = language_models[base_config]

    class PrunedConfig(base_config):
        model_type = f"pruned_{family}"
        # Code in transformers 5 that expects one size for all layers reads the global size instead of raising.
        allow_global_per_layer_attribute_access = True

        def validate(self) -> None:
            """Does nothing. Some stock configs require a head count that divides hidden_size. head_dim is explicit."""

        def _rope_scaling_validation(self) -> None:
            """Does nothing. A Phi-3 of transformers 4 checks its long rotary factors by hidden_size / heads."""

    class PerLayer:
        def __init__(self, config: Any) -> None:
            one_size = layer_config(config, 0)
            super().__init__(one_size)  # pyright: ignore[reportCallIssue]  # a base that only runs know
            model: Any = self
            inner = getattr(model, "model", model)  # base_model has no layers in a Gemma 3 of 4.57
            config._attn_implementation = one_size._attn_implementation  # chosen by transformers
            # It was built with one size, because transformers 5 warns when a global size is read.
            model.config = inner.config = config
            rebuild_layers(inner, config)
            model.post_init()

        @classmethod
        def _can_set_attn_implementation(cls) -> bool:
            """Asks the stock class. transformers looks for attention in the file of a class, not in this one."""
            return base_lm._can_set_attn_implementation()

        @classmethod
        def _supports_default_dynamic_cache(cls) -> bool:
            """Asks the stock class. transformers 4.57 knows by the class's name that an LFM2 has its own cache."""
            return base_lm._supports_default_dynamic_cache()

        def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
            """Sets the implementation in every layer, because each has a separate config."""
            super().set_attn_implementation(*args, **kwargs)  # type: ignore[misc]
            model: Any = self
            for module in model.modules():
                if isinstance(getattr(module, "config", None), base_config):
                    module.config._attn_implementation = model.config._attn_implementation

    class PrunedModel(PerLayer, base_model):
        config_class = PrunedConfig

    class PrunedLanguageModel(PerLayer, base_lm):
        config_class = PrunedConfig

    share_conversions(family, PrunedConfig.model_type)
    # transformers writes this name into config.json, under `architectures`.
    PrunedLanguageModel.__name__ = "PrunedForSeq2SeqLM" if is_seq2seq else "PrunedForCausalLM"
    return PrunedConfig, PrunedModel, PrunedLanguageModel


def share_conversions(family: str, model_type: str) -> None:
    """Makes transformers 5 stack experts while it reads weight files, as for the stock family."""
    try:
        from transformers import conversion_mapping
    except ImportError:  # transformers 4 keeps experts separate, like the files
        return
    conversions = conversion_mapping.get_checkpoint_conversion_mapping(family)
    if conversions is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(
            model_type, conversions, overwrite=True
        )


PrunedConfig, PrunedModel, language_model = pruned_classes(FAMILY)
PrunedForCausalLM = PrunedForSeq2SeqLM = language_model
