"""A pretrained model on disk: its config, its modules without weights, and the weights to fill them with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from loraprune_ds.config import ModelConfig, PruneConfig
from loraprune_ds.files import read_json
from loraprune_ds.model.read_shape import check_family, read_model, text_config, text_tensors
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.storage import FrozenStorage
from loraprune_ds.model.weight_files import read_headers
from loraprune_ds.model.weights import HEAD, ModelWeights, check_weights


@dataclass(frozen=True)
class PretrainedModel:
    """A model of a family in family.py.

    Attributes:
        config: config.json, or its text part.
        modules: on the meta device, as the config describes them. Engines copy them.
        weights: of these modules, or of the smaller ones that cuts have left.
    """

    folder: Path
    config: dict[str, Any]
    modules: PreTrainedModel
    weights: ModelWeights

    @property
    def shape(self) -> ModelShape:
        return self.weights.shape


def open_pretrained(folder: Path) -> PretrainedModel:
    """Reads config.json and the headers of all weight files. Takes the text part of a multimodal model.

    Raises:
        UserError: the model is not supported. A file is missing, surplus or damaged. A tensor is missing, surplus or
            quantized, or its shape contradicts config.json.
    """
    where = str(folder)
    full = read_json(folder / "config.json")
    config = text_config(full, where)
    shape, modules = read_model(config, where)
    headers = read_headers(folder)
    names = {name: name for name in headers}
    if config is not full:
        names = text_tensors(headers, where)
        if HEAD in names and shape.tie_word_embeddings:
            config = config | {"tie_word_embeddings": False}  # as transformers decides
            shape, modules = read_model(config, where)
    extra = config.get("num_nextn_predict_layers") or 0  # layers after the last one, which the model does not use
    beyond = tuple(f"model.layers.{len(shape.layers) + i}." for i in range(extra))
    names = {name: in_file for name, in_file in names.items() if not name.startswith(beyond)}
    return PretrainedModel(folder, config, modules, check_weights(folder, headers, names, shape, "config.json"))


def open_for_pruning(folder: Path, model: ModelConfig, prune: PruneConfig, *, packing: bool = False) -> PretrainedModel:
    """Opens the model of a run as `open_pretrained`, and checks that it has everything that the run needs."""
    pretrained = open_pretrained(folder)
    check_family(pretrained.shape.family, pretrained.config, str(folder), prune, packing=packing)
    return replace(pretrained, weights=replace(pretrained.weights, storage=FrozenStorage.from_config(model)))
