"""Reads the layers of a model that another trainer trains, for an export."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from loraprune_ds.config_types import Dtype
from loraprune_ds.model.adapters import base_parameter
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.exported_config import ExportedConfig
from loraprune_ds.pruning.prunable_model import CollectedLinear, PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owner_rounds


@dataclass(frozen=True)
class LiveModel:
    """A model that another trainer trains, wherever it came from: a `LayerSource` (export/huggingface.py).

    No rank ever holds more than one layer, or the embedding and head.
    """

    model: PrunableModel
    exported: ExportedConfig
    dense_folder: Path  # has config.json, tokenizer and settings of the dense model
    dtype: Dtype
    tower = None

    def files(
        self, ranks: Communicator, *, merge: bool = True
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yields merged layers with the learned copies of PEFT's modules_to_save, others with the initial ones."""
        for indices in owner_rounds(len(self.model.layers) + 1, ranks.world_size):
            gathered = ((k, self._gather(k, merge)) for k in indices)
            own = [(k, tensors) for k, tensors in gathered if tensors]
            # the owners of a round work in parallel. None keeps its layer until the next round
            while own:
                yield own.pop()

    def _gather(self, k: int, merge: bool) -> dict[str, Tensor]:
        """Gathers a layer, or after the last one the parameters outside, on its owner. Empty elsewhere. Collective."""
        model, shape, owner, tensors = (
            self.model,
            self.model.shape,
            self.model.owner(k),
            dict[str, Tensor](),
        )
        parent, prefix, others = cast(Any, model.module).get_base_model(), "", shape.outer
        if k < len(shape.layers):
            parent, prefix, others = model.layers[k], shape.prefix(k), shape.layers[k].others
            for linear in shape.layers[k].linears:
                collected = model.collect_linear(LinearId(k, linear.linear))
                if collected is not None:  # converted before the next linear arrives
                    tensors |= self._convert(f"{prefix}{linear.linear}", collected, merge)
                del collected
        found = model.collect_named(
            {x.name: base_parameter(parent, x.name, trained=merge) for x in others}, owner
        )
        for tensor in others if found else ():
            value = found[tensor.name]
            tensors[prefix + tensor.name] = (
                value if tensor.keep_fp32 else value.to(DTYPES[self.dtype])
            )
        return tensors

    def _convert(self, name: str, x: CollectedLinear, merge: bool) -> dict[str, Tensor]:
        dtype = DTYPES[self.dtype]
        weight = (
            merge_lora(x.weight, x.lora_A, x.lora_B, x.scaling, dtype)
            if merge
            else x.weight.to(dtype)
        )
        return {f"{name}.weight": weight} | (
            {} if x.bias is None else {f"{name}.bias": x.bias.to(dtype)}
        )
