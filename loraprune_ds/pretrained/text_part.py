"""The text part of a multimodal model, and its tower. Only the text part is built. The tower is copied."""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from loraprune_ds.errors import UserError
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import config_class, config_object, refused_in_one_line
from loraprune_ds.model.count_limits import check_counts
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.model.families.base import Prefixes
from loraprune_ds.model.family import FAMILIES, family_name
from loraprune_ds.model.groups import EQUAL_LAYERS, Shape
from loraprune_ds.model.shape import FIRST, ModelShape
from loraprune_ds.pretrained.exported_config import multimodal_config
from loraprune_ds.pretrained.weight_files import PROCESSOR_FILES, as_on_disk

# Without an image their forward equals the text class's. Their weight files have one of PREFIXES.
MULTIMODAL = (
    "gemma3 mistral3 llava llava_next llava_onevision vipllava internvl idefics3 smolvlm "
    "qwen2_5_vl qwen3_vl qwen3_5 qwen3_5_moe qwen3_vl_moe gemma4 muse_glimmer"
).split()
# A text class without a causal LM -> the family that computes the same if all rows of positions are equal.
STANDS_FOR: dict[str, JsonObject] = {
    "qwen2_5_vl_text": {"model_type": "qwen2"},
    "qwen3_vl_text": {"model_type": "qwen3"},
    "qwen3_vl_moe_text": {"model_type": "qwen3_moe", "norm_topk_prob": True},
}
# Their files have the experts of a layer in one tensor, each expert transposed.
TRANSPOSED = ("qwen3_vl_moe",)
OF_ROWS = ("mrope_section", "mrope_interleaved")  # rotary settings for rows of positions
# transformers saves the first one or two, and reads all.
PREFIXES = (
    Prefixes("language_model.model.", "language_model.lm_head."),
    Prefixes("model.language_model."),
    Prefixes("model.text_model."),
    Prefixes(),
)
# Published text configs omit sizes that are defaults of their class.
TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
)
# fields outside the text config
SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")
MTP = "mtp."  # prefix of the layers that predict further tokens, which are left out
OR_TEXT = "or model.text_only: true, to export the text part alone"


@dataclass(frozen=True)
class Tower:
    """The rest of a multimodal model, outside its text part.

    Attributes:
        config: config.json of the whole model.
        prefixes: the names of the text part in the weight files.
        files: the other tensors, and the weight file of each.
    """

    config: JsonObject
    prefixes: Prefixes
    files: Mapping[str, Path]

    @property
    def key_mapping(self) -> dict[str, str]:
        """The option with which transformers' `from_pretrained` loads the text class."""
        prefixes = zip(self.prefixes, Prefixes(), strict=True)
        return {f"^{re.escape(prefix)}": text for prefix, text in prefixes}


def in_files(
    tensors: Mapping[str, Tensor], shape: ModelShape, tower: Tower | None
) -> dict[str, Tensor]:
    """Returns tensors under their names in weight files, of the text class or of the class with this tower.

    Copies of a bias that layers share are left out.
    """
    name_on_disk = (tower or shape.family).prefixes.name_on_disk
    copies = shape.shared_tensors
    transposed = tower is not None and tower.config["model_type"] in TRANSPOSED
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies}
    return as_on_disk(tensors, shape.pieces(transposed=transposed), name_on_disk)


def text_config(config: JsonObject, where: str) -> JsonObject:
    """Returns the config of a text model, or of a multimodal model's text part, with all sizes of the family."""
    check_counts(config, where)
    text = config
    if config.get("model_type") in MULTIMODAL:
        text = _text_part(config, where)
        if FIRST in config:
            text |= {FIRST: config[FIRST]}
    family = FAMILIES.get(family_name(str(text.get("model_type"))))
    with refused_in_one_line(where):
        text = family.explicit(text) if family else text
    check_counts(text, where)  # again, because some families count the layers of a list
    return text


def _text_part(config: JsonObject, where: str) -> JsonObject:
    with refused_in_one_line(where):
        multimodal = config_object(config)
        inner = multimodal.get_text_config()
    # from the outer config, by the rules of its class
    tied = {"tie_word_embeddings": bool(multimodal.tie_word_embeddings)}
    if inner.model_type in STANDS_FOR:
        text = json.loads(inner.to_json_string(use_diff=False))
        for name in OF_ROWS:
            text["rope_parameters"].pop(name, None)
        return text | tied | STANDS_FOR[inner.model_type]
    text = config.get("text_config") or {}
    settings: JsonObject = {}
    if text.get("model_type") in FAMILIES:
        defaults = config_class(text["model_type"])
        settings = {name: getattr(defaults, name) for name in TEXT_SIZES if hasattr(defaults, name)}
    settings |= {name: config[name] for name in SHARED if name in config}
    return settings | text | tied


def find_prefixes(stored: Collection[str], where: str) -> Prefixes:
    """Returns the prefixes of the weight files that hold the tensors `stored` of a multimodal model."""
    for prefixes in PREFIXES:
        if f"{prefixes.decoder}embed_tokens.weight" in stored:
            return prefixes
    decoders = " or ".join(prefixes.decoder for prefixes in PREFIXES)
    raise UserError(f"{where}: its weight files have no text part under {decoders}")


def check_tower(config: JsonObject, pruned: ModelShape | None, where: str) -> None:
    """Checks that the stock multimodal class of a config.json can hold the pruned text part.

    Args:
        pruned: the result, or None if scores decide what each layer keeps.

    Raises:
        UserError: the class cannot hold it, or the tower is unknown. The line names `where`, the folder or hub id.
    """
    if pruned is None or not pruned.is_uniform:
        raise UserError(
            f"{where}: a stock class with a tower needs layers of one size: set {EQUAL_LAYERS}, {OR_TEXT}"
        )
    full = multimodal_config(config, pruned, "float32")
    advice = (
        f"; for another number of heads set prune.tensor_parallel or prune.head_ratio, {OR_TEXT}"
    )
    with refused_in_one_line(where, advice):
        held = _decoder_shapes(full)
    for name, size in pruned.parameters().items():
        if name.startswith("model.") and held.get(name.removeprefix("model.")) != size:
            raise UserError(
                f"{where}: its stock multimodal class cannot hold {name} as {list(size)}; "
                f"keep all heads (prune.head_ratio: 0), {OR_TEXT}"
            )


def _decoder_shapes(config: JsonObject) -> dict[str, Shape]:
    """Returns the shapes of a multimodal model's decoder by their names inside it."""
    settings = config_object(config)
    stock: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(settings)]
    with init_empty_weights(include_buffers=False):
        decoder: nn.Module = stock._from_config(settings, dtype=torch.float32).get_decoder()
        stack_experts(decoder)
    return {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}


def check_processor(folder: Path) -> None:
    """Raises UserError if the folder of a multimodal model lacks the settings of its image processor."""
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(
            f"{folder} has none of {', '.join(PROCESSOR_FILES)}, which its tower needs; add it, {OR_TEXT}"
        )
