"""A pretrained model on disk: its config, its modules without weights, and the weights to fill them with.

Weights are checked by the headers of their files, and read in parts, so that no rank holds the full model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.config_types import Bits, Compensation, Dtype
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.model.codecs import CODECS
from loraprune_ds.model.families.blocks import QUERY_HEADS_LEAVE
from loraprune_ds.model.frozen import DTYPES, Blocks
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.storage import AS_THEY_ARE, Storage
from loraprune_ds.pretrained.quantised import headers_of_weights, quantised_weights
from loraprune_ds.pretrained.read_shape import check_depth, check_family, read_family, read_model
from loraprune_ds.pretrained.text_part import (
    MTP,
    MULTIMODAL,
    Prefixes,
    Tower,
    find_prefixes,
    text_config,
)
from loraprune_ds.pretrained.weight_files import Headers, have_equal_values, read_headers
from loraprune_ds.pretrained.weights import HEAD, ModelWeights, check_weights
from loraprune_ds.versions import check_installed

ERNIE_MTP = "model.mtp_"  # an Ernie 4.5 has this prefix for the layers under `MTP`


@dataclass(frozen=True)
class PretrainedModel:
    """A model of a family in family.py.

    Attributes:
        config: config.json, or its text part.
        modules: on the meta device, as in the config. Engines copy them.
        weights: of these modules, or of the smaller ones after cuts.
        tower: the rest of a multimodal model. None if the export has no place for it.
        storage: of linears on the ranks.
    """

    folder: Path
    config: JsonObject
    modules: PreTrainedModel
    weights: ModelWeights
    tower: Tower | None = None
    storage: Storage = AS_THEY_ARE

    @property
    def shape(self) -> ModelShape:
        return self.weights.shape

    def with_refits(self, compensate: Compensation | None) -> "PretrainedModel":
        """Returns the model with the storage that linears need under `prune.compensate`."""
        return self.stored_by(self.storage._replace(refits=compensate != "none"))

    def stored_by(self, storage: Storage) -> "PretrainedModel":
        """Returns the model with its linears in the formats of `storage`."""
        weights = replace(self.weights, formats=storage.formats(self.shape))
        return replace(self, weights=weights, storage=storage)


def open_pretrained(
    folder: Path, *, query_heads: bool = True, quantised: bool = False
) -> PretrainedModel:
    """Reads config.json and the headers of all weight files. Takes the text part of a multimodal model.

    Args:
        query_heads: single ones leave, where a model has one or two key-value heads.
        quantised: bitsandbytes' tensors may stand for weights. `open_quantised` reads them.

    Raises:
        UserError: the model is not supported. A file is missing, surplus or damaged. A tensor is missing, surplus or
            quantized, or its shape contradicts config.json.
    """
    where = str(folder)
    full = read_json(folder / "config.json")
    config = text_config(full, where)
    if not query_heads:
        config = config | {QUERY_HEADS_LEAVE: False}
    family = read_family(config, where)
    headers = read_headers(folder)
    if quantised:
        headers = headers_of_weights(headers)
    tower = None
    prefixes = family.prefixes
    text_tensors = list(headers)
    if full.get("model_type") in MULTIMODAL:
        prefixes = find_prefixes(headers, where)
        text_tensors = [name for name in headers if name.startswith(prefixes)]
        tower = Tower(full, prefixes, _tower_files(headers, prefixes))
    names = {prefixes.name_in_class(name): name for name in text_tensors}
    check_depth(config, family, names, where)
    shape, modules = read_model(config, where)
    tied = _is_tied(config, shape, names, headers)
    if tied and HEAD in names:
        names.setdefault(shape.outer[0].name, names[HEAD])
    if tied != shape.tie_word_embeddings:
        config = config | {"tie_word_embeddings": tied}
        shape, modules = read_model(config, where)
    for copy, first in shape.shared_tensors.items():
        if first in names:
            names.setdefault(copy, names[first])
    count = config.get("num_nextn_predict_layers") or 0  # unused layers after the last one
    unused = [f"model.layers.{len(shape.layers) + i}." for i in range(count)]
    in_model = {
        name: in_file
        for name, in_file in names.items()
        if not name.startswith((MTP, ERNIE_MTP, *unused))
    }
    weights = check_weights(folder, headers, in_model, shape)
    return PretrainedModel(folder, config, modules, weights, tower)


def open_quantised(
    folder: Path, bits: Bits, formats: Mapping[str, str], dtype: Dtype, *, query_heads: bool = True
) -> PretrainedModel:
    """Opens a model that bitsandbytes quantised when it was loaded, or that has been stored so.

    Args:
        formats: how pruning stores linears: "{layer}.{linear}" -> name of a format.
        dtype: of the weights before, in which the model computes.

    Raises:
        UserError: like `open_pretrained`. bitsandbytes is not installed.
    """
    check_installed("bitsandbytes", f"{folder}, quantised by bitsandbytes,")
    pretrained = open_pretrained(folder, query_heads=query_heads, quantised=True)
    shape = pretrained.shape
    of_weights = dict[str, Blocks]()
    for layer, linear in shape.linears():
        name = formats.get(f"{layer}.{linear.linear}")
        if name is not None:
            stored_as = Blocks(CODECS[name], DTYPES[dtype], linear.loses_inputs)
            of_weights[shape.prefix(layer) + linear.name] = stored_as
    weights = quantised_weights(pretrained.weights, bits, of_weights, read_headers(folder))
    return replace(pretrained, weights=weights, tower=None)


def _tower_files(headers: Headers, prefixes: Prefixes) -> dict[str, Path]:
    """Returns tensor name -> weight file of a tower."""
    text = (*prefixes, MTP)
    return {name: file for name, (_, _, file) in headers.items() if not name.startswith(text)}


def _is_tied(
    config: JsonObject, shape: ModelShape, names: dict[str, str], headers: Headers
) -> bool:
    """Returns True if the embedding is also the head. Files may have both all the same."""
    # transformers ties every T5
    if not shape.tie_word_embeddings and config.get("scale_decoder_outputs") is not False:
        return False
    embedding = names.get(shape.outer[0].name)
    head = names.get(HEAD)
    return embedding is None or head is None or have_equal_values(embedding, head, headers)


def open_for_pruning(
    folder: Path, model: ModelConfig, *, packing: bool = False, query_heads: bool = True
) -> PretrainedModel:
    """Opens the model of a run like `open_pretrained`, and checks that the run can use it."""
    pretrained = open_pretrained(folder, query_heads=query_heads)
    check_family(
        pretrained.shape.family, pretrained.config, str(folder), model.dtype, packing=packing
    )
    storage = Storage(model.frozen, dtype=DTYPES[model.dtype])
    storage.check(pretrained.shape, str(folder))
    tower = None if model.text_only else pretrained.tower
    return replace(pretrained, tower=tower).stored_by(storage)
