"""A step of a run as a model: slices of the source, refitted linears, and LoRA. Reading it needs no DeepSpeed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from loraprune_ds.agreement import Ranks
from loraprune_ds.checkpoint.load import TrainingCheckpoint, open_checkpoint
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.pretrained import ModelWeights, PretrainedModel, open_for_pruning
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.text_part import Tower


@dataclass(frozen=True)
class Step:
    """A verified checkpoint with the `dense` model of its run. It is a `LayerSource` (export/huggingface.py)."""

    checkpoint: TrainingCheckpoint
    dense: PretrainedModel

    @cached_property
    def base(self) -> ModelWeights:
        """The pruned weights without LoRA."""
        return self.checkpoint.frozen_model(self.dense).weights

    @property
    def shape(self) -> ModelShape:
        return self.base.shape

    @property
    def exported(self) -> ExportedConfig:
        dtype, tower = self.checkpoint.config.model.dtype, self.tower
        return export_config(self.dense.config, self.shape, dtype, tower and tower.config)

    @property
    def folder(self) -> Path:
        return self.dense.folder

    @property
    def tower(self) -> Tower | None:
        return self.dense.tower

    def files(self, ranks: Ranks, *, merge: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
        layers = len(self.shape.layers)
        for k in range(ranks.rank, layers, ranks.world_size):
            yield k, self._layer(k, merge=merge)
        if layers % ranks.world_size == ranks.rank:
            yield layers, self._read(tensor.name for tensor in self.shape.outer)

    def _layer(self, layer: int, *, merge: bool) -> dict[str, Tensor]:
        tensors = self._read(name for name, _ in self.shape.layer_tensors(layer))
        if merge:
            lora, config = self.checkpoint.lora(layer), self.checkpoint.config.lora
            scaling = config.lora_alpha / config.r
            for linear in self.shape.layers[layer].linears:
                name, (a, b) = f"{self.shape.prefix(layer)}{linear.name}", (f"{linear.linear}.lora_{x}" for x in "AB")
                tensors[name] = merge_lora(tensors[name], lora[a], lora[b], scaling, tensors[name].dtype)
        return tensors

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.base.read_full(name, DTYPES[self.checkpoint.config.model.dtype]) for name in names}


def open_step(folder: Path) -> Step:
    """Verifies a checkpoint, and opens the model at its run's `model.path`. Raises UserError if one is unusable."""
    checkpoint = open_checkpoint(folder, Ranks())
    model = checkpoint.config.model
    return Step(checkpoint, open_for_pruning(locate_model(model), model))
