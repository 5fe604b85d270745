"""Stores linears of bitsandbytes as pruning does: those of a live model, or the same ones made from a folder again.

4 bits  Linears that lose rows keep their codes and scales bit by bit. Double quantisation of the scales is undone: its
        blocks of 256 scales span rows. Linears that lose columns (o_proj, down_proj) are stored again, with blocks
        along the hidden axis: as int8 if refits rewrite them, otherwise as NF4.
8 bits  The scale of a row becomes scales of blocks. The threshold for outliers (llm_int8_threshold) ends.

A folder has either the weights before bitsandbytes quantised them, or bitsandbytes' own tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from loraprune_ds.config_types import Bits
from loraprune_ds.model.codecs import BLOCK, NF4
from loraprune_ds.model.frozen import SCALE, WEIGHT, Blocks
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.pretrained.weight_files import Headers
from loraprune_ds.pretrained.weights import ModelWeights

STATE = "quant_state.bitsandbytes__nf4"  # JSON, as bytes
# the tensors beside a weight in 4 bits
BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
ROW_SCALES = "SCB"  # beside a weight in 8 bits


def tensors_of_4_bits(
    weight: Any, spec: TensorSpec, stored_as: Blocks, source: Tensor | None
) -> dict[str, Tensor]:
    """Stores a weight in 4 bits. `source` is the weight before, for a linear that loses columns."""
    blocks = blocks_of_4_bits(weight)
    if not spec.loses_inputs:
        rows, _ = spec.matrix
        return {name: tensor.view(rows, -1) for name, tensor in blocks.items()}
    if source is None:
        rows = Blocks(NF4, weight.quant_state.dtype)
        source = rows.join(blocks.values()).view(spec.matrix)
    return stored_as.split(source)


def _bitsandbytes() -> Any:
    """Imports it late, because it is optional. It marks nothing as public."""
    import bitsandbytes

    return bitsandbytes


def blocks_of_4_bits(weight: Any) -> dict[str, Tensor]:
    """Returns codes, (blocks, BLOCK / 2), and scales, (blocks, 1), of a weight in 4 bits."""
    functional = _bitsandbytes().functional
    codes = weight.data.as_subclass(Tensor)
    state: Any = weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # an evaluation on a CPU packs weights
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
    scale = state.absmax
    if state.nested:
        scale = functional.dequantize_blockwise(scale, state.state2) + state.offset
    codes = codes.view(torch.uint8).view(-1, BLOCK // 2)
    return {WEIGHT: codes, SCALE: scale.float().view(-1, 1)}


def tensors_of_8_bits(values: Tensor, scale: Tensor, stored_as: Blocks) -> dict[str, Tensor]:
    """Stores a weight in 8 bits, int8 with a scale per row."""
    functional = _bitsandbytes().functional
    weight = functional.int8_vectorwise_dequant(values, scale)
    return stored_as.split(weight.to(stored_as.dtype))


def headers_of_weights(headers: Headers) -> Headers:
    """Returns headers that have one tensor for all those in which bitsandbytes stores a weight."""
    result = dict(headers)
    for name, (_, _, path) in headers.items():
        if name.endswith(f".{STATE}"):
            weight = name.removesuffix(f".{STATE}")
            state = json.loads(bytes(_read(path, name).tolist()))
            shape = tuple(state["shape"])
            for part in BESIDE:
                result.pop(f"{weight}.{part}", None)
        elif name.endswith(f".{ROW_SCALES}"):
            linear = name.removesuffix(ROW_SCALES)
            weight = f"{linear}{WEIGHT}"
            shape, _, _ = headers[weight]
            del result[name]
            result.pop(f"{linear}weight_format", None)
        else:
            continue
        result[weight] = shape, "BF16", headers[weight][2]
    return result


def quantised_weights(
    dense: ModelWeights, bits: Bits, formats: Mapping[str, Blocks], headers: Headers
) -> "QuantisedWeights":
    """Returns the weights as pruning stores them. `headers` are of the folder's files as they are."""
    files: dict[str, Path] = {}
    if headers_of_weights(headers) != headers:
        files = {name: path for name, (_, _, path) in headers.items()}
    stored = replace(dense, formats=formats)
    return QuantisedWeights(**vars(stored), dense=dense, bits=bits, files_of_bits=files)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@dataclass(frozen=True)
class QuantisedWeights(ModelWeights):
    """Reads the weights of a model that bitsandbytes quantised, as a training under pruning stored them.

    Each linear is quantised as it was when the training began, and cut afterwards. Refitted linears are as in a step.

    Attributes:
        dense: the weights in the folder, without a cut.
        bits: how bitsandbytes quantised them.
        files_of_bits: name in the folder -> file, of all tensors, if the folder has bitsandbytes' tensors.
    """

    dense: ModelWeights = field(kw_only=True)
    bits: Bits = field(kw_only=True)
    files_of_bits: Mapping[str, Path] = field(kw_only=True)

    def read_full(self, name: str, dtype: torch.dtype) -> Tensor:
        stored_as = self.formats.get(name)
        scale = f"{name.removesuffix(WEIGHT)}{SCALE}"
        if stored_as is None or scale in self.files:  # the second is of a refit
            return super().read_full(name, dtype)
        parts = self._take_over(name, stored_as).values()
        if name in self.slices:
            kept = stored_as.kept(self.slices[name])
            parts = [part.index_select(*kept) for part in parts]
        return stored_as.join(parts)

    def _take_over(self, name: str, stored_as: Blocks) -> dict[str, Tensor]:
        """Returns the tensors that stored a linear when the training began."""
        source = None
        if not self.files_of_bits:
            source = self.dense.read_full(name, stored_as.dtype)
        if self.bits == "int8":
            weight = self._in_8_bits(name, source)
            return tensors_of_8_bits(weight.CB, weight.SCB, stored_as)
        spec = self.dense.spec(name)
        return tensors_of_4_bits(self._in_4_bits(name, source), spec, stored_as, source)

    def _in_4_bits(self, name: str, source: Tensor | None) -> Any:
        kind = _bitsandbytes().nn.Params4bit
        if source is not None:
            double = self.bits == "nf4_double"
            return kind(source, quant_type="nf4", compress_statistics=double).to("cpu")
        stored = self._read_bits(name)
        return kind.from_prequantized(stored.pop(WEIGHT), stored, device="cpu")

    def _in_8_bits(self, name: str, source: Tensor | None) -> Any:
        kind = _bitsandbytes().nn.Int8Params
        if source is not None:
            return kind(source, requires_grad=False).to("cpu")
        stored = self._read_bits(name)
        return kind(stored[WEIGHT], CB=stored[WEIGHT], SCB=stored[ROW_SCALES], requires_grad=False)

    def _read_bits(self, name: str) -> dict[str, Tensor]:
        """Reads the tensors in which bitsandbytes stores a linear, by their names in its module."""
        weight = self.dense.names_on_disk[name]
        linear = weight.removesuffix(WEIGHT)
        names = {WEIGHT: weight, ROW_SCALES: f"{linear}{ROW_SCALES}"}
        names |= {part: f"{weight}.{part}" for part in BESIDE}
        files = self.files_of_bits
        return {part: _read(files[full], full) for part, full in names.items() if full in files}
