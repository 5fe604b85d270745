"""Reads only the text part of a multimodal model, by its prefix. It is exported as a model of the text class."""

from collections.abc import Collection
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.model.classes import config_class, config_object, refused_in_one_line
from loraprune_ds.model.family import FAMILIES

# Without an image their forward equals the text class's, and their weight files have one of LAYOUTS.
MULTIMODAL = "gemma3 mistral3 llava llava_next llava_onevision vipllava internvl idefics3 smolvlm".split()
# Prefix of the decoder, prefix of the head. transformers saves the first one and also reads the second.
LAYOUTS = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
)
# Published text configs leave out sizes that their class has as defaults.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
SIZES += ("num_attention_heads", "num_key_value_heads")
SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")  # outside the text config


def text_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the config of a multimodal model's text part, and the config of any other model unchanged."""
    if config.get("model_type") not in MULTIMODAL or not isinstance(text := config.get("text_config"), dict):
        return config
    defaults = config_class(text["model_type"]) if text.get("model_type") in FAMILIES else None
    sizes = {name: getattr(defaults, name) for name in SIZES if hasattr(defaults, name)}
    shared = {name: config[name] for name in SHARED if name in config}
    with refused_in_one_line(where):
        tied = bool(config_object(config).tie_word_embeddings)  # by the outer config and the rules of its class
    return sizes | shared | text | {"tie_word_embeddings": tied}


def text_tensors(stored: Collection[str], where: str) -> dict[str, str]:
    """Maps the names of the text class to the names `stored` in the weight files of a multimodal model."""
    for decoder, head in LAYOUTS:
        if f"{decoder}embed_tokens.weight" in stored:
            prefixes = {decoder: "model.", head: "lm_head."}
            return {
                text + name.removeprefix(prefix): name
                for name in stored
                for prefix, text in prefixes.items()
                if name.startswith(prefix)
            }
    raise UserError(f"{where}: its weight files hold no text part under {' or '.join(x for x, _ in LAYOUTS)}")
