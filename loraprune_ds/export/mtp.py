"""Cuts the layers that predict further tokens (MTP) to the counts of the pruned model."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.groups import EQUAL_LAYERS, LayerCounts, LayerKeep, TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained import weight_files
from loraprune_ds.pretrained.exported_config import NEXT_TOKENS
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.text_part import MTP
from loraprune_ds.pretrained.weights import ModelWeights, check_weights
from loraprune_ds.pruning.importance import GroupSums, sums_of_spans
from loraprune_ds.pruning.ranking import keep_best

MTP_FILE = "mtp.safetensors"
FC = f"{MTP}fc.weight"  # joins the embedding and the last hidden state of a token, before these layers
LAYERS = "model.layers."
IN_FILE = f"{MTP}layers."
NOTE = f"{MTP_FILE} has the layers that predict further tokens, cut by the norms of their weights and not tuned"


def cut_mtp(folder: Path, pruned: ModelShape) -> ModelWeights:
    """Opens these layers of a dense model, and cuts them to the counts of the same layers in `pruned`.

    Raises:
        UserError: the model in `folder` has no such layers, or `pruned` is not a cut of it or has layers of different
            sizes. Also the errors of `check_weights`.
    """
    dense = open_pretrained(folder)
    all_headers = weight_files.read_headers(folder)
    headers = {name: header for name, header in all_headers.items() if name.startswith(MTP)}
    layer_count = dense.config.get(NEXT_TOKENS, 1)
    require(
        FC in headers and layer_count, f"{folder} has no layers that predict further tokens ({FC})"
    )
    require(
        pruned.is_uniform,
        f"layers that predict further tokens ({MTP}*) need layers of one size: {EQUAL_LAYERS}",
    )
    layer = _one_attention_layer(dense.shape)
    counts = _counts_after(layer, _one_attention_layer(pruned))
    if counts is None:
        raise UserError(f"{folder} is not the dense model: its sizes do not fit the pruned model")
    outer = [
        TensorSpec(name, shape=tensor_shape)
        for name, (tensor_shape, *_) in headers.items()
        if not name.startswith(IN_FILE)
    ]
    shape = replace(layer.only([0] * layer_count), outer=tuple(outer))
    # The layers are checked under the names of decoder layers. Errors must show those in the file.
    names = {name.replace(IN_FILE, LAYERS): name for name in headers}
    try:
        weights = check_weights(folder, headers, names, shape)
    except UserError as error:
        raise UserError(str(error).replace(LAYERS, IN_FILE)) from None
    return weights.cut(_largest(weights, counts))


def _one_attention_layer(shape: ModelShape) -> ModelShape:
    """Returns the shape of a model with only the first attention layer, if any."""
    for i, layer in enumerate(shape.layers):
        if layer.key_value_heads and shape.kinds[-1] in layer.counts:
            return shape.only([i])
    return shape.only([])


def _counts_after(layer: ModelShape, pruned: ModelShape) -> LayerCounts | None:
    """Returns the counts of groups that turn a dense layer into the pruned one. None if no cut does."""
    if not layer.layers:
        return None
    # from the sizes of tensors, because the groups of the pruned layer may be of another kind
    pruned_shapes = {tensor.name: tensor.shape for _, tensor in pruned.tensors()}
    dense_counts = layer.counts[0]
    counts = dict(dense_counts)
    for _, linear in layer.linears():
        if linear.name in pruned_shapes:
            size = pruned_shapes[linear.name][linear.axis]
            for kind in linear.kinds:
                counts[kind] = size // linear.group_width
    result = LayerCounts(counts)
    if layer.resized([result]).parameters() != pruned.parameters():
        return None
    is_cut = all(result[kind] <= count for kind, count in dense_counts.items())
    return result if is_cut else None


def _largest(weights: ModelWeights, counts: LayerCounts) -> list[LayerKeep]:
    """Keeps these counts of groups in each layer, those with the largest sums of squared weights."""
    shape = weights.shape
    sums: list[Tensor] = []
    linears = [(layer, linear) for layer, linear in shape.linears() if linear.spans]
    for layer, linear in linears:
        name = f"{LAYERS}{layer}.{linear.name}"
        weight = weights.read_full(name, torch.float32)
        squares = weight.square_().sum(1 - linear.axis, dtype=torch.float64)
        sums += sums_of_spans(linear, squares)
    scores = GroupSums(shape, linears, sums, step=0).by_layer("none")
    return keep_best(scores, [counts] * len(scores), shape)


def add_mtp(weights: ModelWeights, folder: Path) -> str:
    """Writes the weights from `cut_mtp` into the folder of the pruned model, in its dtype. Returns a note."""
    with safe_open(weights.files[FC], framework="pt") as file:
        dtype = file.get_tensor(FC).dtype
    tensors = {name: weights.read_full(name, dtype) for name in weights.shape.parameters()}
    on_disk = weight_files.as_on_disk(
        tensors, weights.shape.pieces(), lambda name: name.replace(LAYERS, IN_FILE)
    )
    weight_files.write_weight_file(folder / MTP_FILE, on_disk)
    file_names = weight_files.weight_file_names(folder)
    weight_files.write_index(folder, [*file_names, MTP_FILE])
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    if NEXT_TOKENS in text:
        text[NEXT_TOKENS] = len(weights.shape.layers)
    write_json(folder / "config.json", config)
    return NOTE
