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
# joins the embedding and the last hidden state of a token, before these layers
FC = f"{MTP}fc.weight"
LAYERS, IN_FILE = "model.layers.", f"{MTP}layers."
NOTE = f"{MTP_FILE} has the layers that predict further tokens, cut by the norms of their weights and not tuned"


def cut_mtp(folder: Path, pruned: ModelShape) -> ModelWeights:
    """Opens these layers of a dense model, and cuts them to the counts of the same layers in `pruned`.

    Raises:
        UserError: the model in `folder` has no such layers, or `pruned` is not a cut of it or has layers of different
            sizes. Also the errors of `check_weights`.
    """
    dense = open_pretrained(folder)
    headers = {
        name: header
        for name, header in weight_files.read_headers(folder).items()
        if name.startswith(MTP)
    }
    count, shape = dense.config.get(NEXT_TOKENS, 1), dense.shape
    require(FC in headers and count, f"{folder} has no layers that predict further tokens ({FC})")
    require(
        pruned.is_uniform,
        f"layers that predict further tokens ({MTP}*) need layers of one size: {EQUAL_LAYERS}",
    )
    one, left = _one_of_their_sort(shape), _one_of_their_sort(pruned)
    # its groups may be of another kind
    sizes = {tensor.name: tensor.shape for _, tensor in left.tensors()}
    linears = [(x, sizes[x.name][x.axis]) for _, x in one.linears() if x.name in sizes]
    kept = {kind: size // x.group_width for x, size in linears for kind in x.kinds}
    counts = [LayerCounts(own | kept) for own in one.counts]
    fits = one.layers != () and one.resized(counts).parameters() == left.parameters()
    is_cut = fits and all(counts[0][kind] <= n for kind, n in one.counts[0].items())
    require(is_cut, f"{folder} is not the dense model: its sizes do not fit the pruned model")
    outer = tuple(
        TensorSpec(name, shape=x)
        for name, (x, *_) in headers.items()
        if not name.startswith(IN_FILE)
    )
    own = replace(one.only([0] * count), outer=outer)
    try:
        names = {name.replace(IN_FILE, LAYERS): name for name in headers}
        weights = check_weights(folder, headers, names, own)
    except UserError as error:
        raise UserError(str(error).replace(LAYERS, IN_FILE)) from None
    return weights.cut(_largest(weights, counts[0]))


def _one_of_their_sort(shape: ModelShape) -> ModelShape:
    """Returns the shape of a model with only the first attention layer, if any."""
    layers = (
        i for i, x in enumerate(shape.layers) if x.key_value_heads and shape.kinds[-1] in x.counts
    )
    return shape.only(list(layers)[:1])


def _largest(weights: ModelWeights, counts: LayerCounts) -> list[LayerKeep]:
    """Keeps these counts of groups in each layer, those with the largest sums of squared weights."""
    shape, sums = weights.shape, list[Tensor]()
    linears = [(i, linear) for i, linear in shape.linears() if linear.spans]
    for i, linear in linears:
        weight = weights.read_full(f"{LAYERS}{i}.{linear.name}", torch.float32)
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
    weight_files.write_index(folder, [*weight_files.weight_file_names(folder), MTP_FILE])
    config = read_json(folder / "config.json")
    text = config.get("text_config", config)
    if NEXT_TOKENS in text:
        text[NEXT_TOKENS] = len(weights.shape.layers)
    write_json(folder / "config.json", config)
    return NOTE
