"""Exports a model that another trainer trains, layer by layer."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn

from loraprune_ds.config_types import Dtype
from loraprune_ds.export.huggingface import begin, publish, saving, try_export, write_model
from loraprune_ds.export.model_card import card_of_state
from loraprune_ds.files import JsonObject, staging_of, write_json
from loraprune_ds.model.adapters import base_parameter
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.weight_files import drop_auto_maps
from loraprune_ds.pruning.prunable_model import CollectedLinear, PrunableModel
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.flat import owner_rounds
from loraprune_ds.session.live import base_config
from loraprune_ds.session.session import PruningSession


def export_live(
    session: PruningSession,
    peft_model: PeftModel,
    folder: Path | None,
    tokenizer: Any,
    *,
    merge: bool,
) -> None:
    """Writes a Hugging Face model. Without a folder, tries all but the weights. Collective.

    Raises:
        UserError: the folder is not empty.
    """
    model = session.model
    comm = model.comm
    config = base_config(peft_model)
    exported = export_config(config, model.shape, session.dtype)
    card = card_of_state(session.state(), session.pruner.limits.dense)
    with tempfile.TemporaryDirectory() as path:
        dense = Path(path)  # has the files of the dense model next to its weights
        comm.write_on_rank_0(dense, lambda: _save_settings(dense, peft_model, config, tokenizer))
        if folder is None:
            comm.on_rank_0(lambda: try_export(exported, dense, card))
            return
        comm.write_on_rank_0(folder, lambda: begin(folder))
        live = LiveModel(model, exported, dense, session.dtype)
        write_model(live, staging_of(folder), card, comm, merge=merge)
    comm.write_on_rank_0(folder, lambda: publish(folder))


@saving()
def _save_settings(dense: Path, peft_model: PeftModel, config: JsonObject, tokenizer: Any) -> None:
    base: Any = peft_model.get_base_model()
    write_json(dense / "config.json", config)
    if base.generation_config is not None:
        base.generation_config.save_pretrained(dense)
    if tokenizer is not None:
        tokenizer.save_pretrained(dense)
        # the trainer's user may trust a tokenizer's code; an export brings none
        drop_auto_maps(dense)


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
            owned = list[tuple[int, dict[str, Tensor]]]()
            for k in indices:
                tensors = self._gather(k, merge)
                if tensors:
                    owned.append((k, tensors))
                del tensors
            # the owners of a round work in parallel. None keeps its layer until the next round
            while owned:
                yield owned.pop()

    def _gather(self, k: int, merge: bool) -> dict[str, Tensor]:
        """Gathers a layer, or after the last one the parameters outside, on its owner. Empty elsewhere. Collective."""
        shape = self.model.shape
        if k == len(shape.layers):
            base = cast(Any, self.model.module).get_base_model()
            return self._gather_others(k, base, shape.outer, merge)
        layer = shape.layers[k]
        prefix = shape.prefix(k)
        tensors = dict[str, Tensor]()
        for linear in layer.linears:
            collected = self.model.collect_linear(LinearId(k, linear.linear))
            if collected is not None:  # converted before the next linear arrives
                tensors |= self._convert(f"{prefix}{linear.linear}", collected, merge)
            del collected
        others = self._gather_others(k, self.model.layers[k], layer.others, merge)
        return tensors | {prefix + name: tensor for name, tensor in others.items()}

    def _gather_others(
        self, k: int, parent: nn.Module, others: Sequence[TensorSpec], merge: bool
    ) -> dict[str, Tensor]:
        parameters = {x.name: base_parameter(parent, x.name, trained=merge) for x in others}
        tensors = self.model.collect_named(parameters, self.model.owner(k))
        for tensor in others:
            if tensor.name in tensors and not tensor.keep_fp32:
                tensors[tensor.name] = tensors[tensor.name].to(DTYPES[self.dtype])
        return tensors

    def _convert(self, name: str, linear: CollectedLinear, merge: bool) -> dict[str, Tensor]:
        dtype = DTYPES[self.dtype]
        if merge:
            weight = merge_lora(linear.weight, linear.lora_A, linear.lora_B, linear.scaling, dtype)
        else:
            weight = linear.weight.to(dtype)
        tensors = {f"{name}.weight": weight}
        if linear.bias is not None:
            tensors[f"{name}.bias"] = linear.bias.to(dtype)
        return tensors
