"""A pretrained model on disk: its config, its modules without weights, and the weights to fill them with.

Weights are checked by the headers of their files, and read in parts, so that no rank holds the full model.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.files import read_json
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import check_depth, check_family, read_family, read_model
from loraprune_ds.pretrained.text_part import MTP, MULTIMODAL, Tower, find_prefixes, text_config
from loraprune_ds.pretrained.weight_files import have_equal_values, read_headers
from loraprune_ds.pretrained.weights import HEAD, ModelWeights, check_weights

ERNIE_MTP = "model.mtp_"  # an Ernie 4.5 has this prefix for the layers under `MTP`


@dataclass(frozen=True)
class PretrainedModel:
    """A model of a family in family.py.

    Attributes:
        config: config.json, or its text part.
        modules: on the meta device, as in the config. Engines copy them.
        weights: of these modules, or of the smaller ones after cuts.
        tower: the rest of a multimodal model. None if the export has no place for it.
    """

    folder: Path
    config: dict[str, Any]
    modules: PreTrainedModel
    weights: ModelWeights
    tower: Tower | None = None

    @property
    def shape(self) -> ModelShape:
        return self.weights.shape


def open_pretrained(folder: Path, *, query_heads: bool = True) -> PretrainedModel:
    """Reads config.json and the headers of all weight files. Takes the text part of a multimodal model.

    Args:
        query_heads: single ones leave, where a model has one or two key-value heads.

    Raises:
        UserError: the model is not supported. A file is missing, surplus or damaged. A tensor is missing, surplus or
            quantized, or its shape contradicts config.json.
    """
    where = str(folder)
    full = read_json(folder / "config.json")
    config = text_config(full, where) | ({} if query_heads else {QUERY_HEADS_LEAVE: False})
    family, headers = read_family(config, where), read_headers(folder)
    names, tower = {family.prefixes.name_in_class(name): name for name in headers}, None
    if full.get("model_type") in MULTIMODAL:
        prefixes = find_prefixes(headers, where)
        names = {
            prefixes.name_in_class(name): name for name in headers if name.startswith(prefixes)
        }
        others = {
            name: file
            for name, (_, _, file) in headers.items()
            if not name.startswith((*prefixes, MTP))
        }
        tower = Tower(full, prefixes, others)
    check_depth(config, family, names, where)
    shape, modules = read_model(config, where)
    embedding = shape.outer[0].name
    # transformers ties every T5
    tied = shape.tie_word_embeddings or config.get("scale_decoder_outputs") is False
    tied = tied and (
        not names.keys() >= {embedding, HEAD}
        or have_equal_values(names[embedding], names[HEAD], headers)
    )
    if tied and HEAD in names:
        names.setdefault(embedding, names[HEAD])
    if tied != shape.tie_word_embeddings:
        config = config | {"tie_word_embeddings": tied}
        shape, modules = read_model(config, where)
    names |= {
        copy: first
        for copy, first in shape.shared_tensors.items()
        if first in names and copy not in names
    }
    extra = config.get("num_nextn_predict_layers") or 0  # unused layers after the last one
    beyond = (MTP, ERNIE_MTP, *(f"model.layers.{len(shape.layers) + i}." for i in range(extra)))
    names = {name: in_file for name, in_file in names.items() if not name.startswith(beyond)}
    weights = check_weights(folder, headers, names, shape)
    return PretrainedModel(folder, config, modules, weights, tower)


def open_for_pruning(
    folder: Path, model: ModelConfig, *, packing: bool = False, query_heads: bool = True
) -> PretrainedModel:
    """Opens the model of a run like `open_pretrained`, and checks that the run can use it."""
    pretrained = open_pretrained(folder, query_heads=query_heads)
    check_family(
        pretrained.shape.family, pretrained.config, str(folder), model.dtype, packing=packing
    )
    weights = replace(pretrained.weights, int8=model.frozen == "int8")
    return replace(pretrained, weights=weights, tower=None if model.text_only else pretrained.tower)
