"""Exports a model that another trainer trains, layer by layer."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor

from loraprune_ds.checkpoint.state import State
from loraprune_ds.config_types import Dtype
from loraprune_ds.export.huggingface import begin, publish, saving, write_model
from loraprune_ds.export.model_card import card_of_state
from loraprune_ds.files import JsonObject, staging_of, write_json
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.lora_product import merge_lora
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.exported_config import ExportedConfig, export_config
from loraprune_ds.pretrained.tokenizer import has_tokenizer, load_tokenizer
from loraprune_ds.pretrained.weight_files import drop_auto_maps
from loraprune_ds.pruning.prunable_model import CollectedLinear, PrunableModel
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session.live import base_config


def export_live(
    pruner: Pruner, state: State, dtype: Dtype, folder: Path | None, tokenizer: Any, *, merge: bool
) -> None:
    """Writes a Hugging Face model. Without a folder, tries its config and tokenizer. Collective.

    Raises:
        UserError: the folder is not empty.
    """
    model = pruner.model
    comm = model.comm
    peft_model = cast(PeftModel, model.module)
    config = base_config(peft_model)
    exported = export_config(config, model.shape, dtype)
    card = card_of_state(state, pruner.limits.dense)
    with tempfile.TemporaryDirectory() as path:
        dense = Path(path)  # has the files of the dense model next to its weights
        comm.write_on_rank_0(dense, lambda: _save_settings(dense, peft_model, config, tokenizer))
        if folder is None:
            return
        comm.write_on_rank_0(folder, lambda: begin(folder))
        live = LiveModel(model, exported, dense, dtype)
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
    if has_tokenizer(dense):
        load_tokenizer(dense)  # as an export may


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

    def layer(self, number: int, ranks: Communicator, *, merge: bool) -> dict[str, Tensor]:
        """Gathers a layer, with the learned copies of PEFT's modules_to_save if merged, or with the initial ones."""
        shape = self.model.shape
        tensors = dict[str, Tensor]()
        specs = shape.outer
        if number < len(shape.layers):
            layer = shape.layers[number]
            specs = layer.others
            for linear in layer.linears:
                collected = self.model.collect_linear(LinearId(number, linear.linear))
                if collected is not None:  # converted before the next linear arrives
                    name = f"{shape.prefix(number)}{linear.linear}"
                    tensors |= self._convert(name, collected, merge)
                del collected
        named = self.model.other_parameters(trained=merge)[number]
        others = self.model.collect_named(named, self.model.owner(number))
        for name, spec in zip(named, specs, strict=True):
            if name in others:
                tensor = others.pop(name)
                tensors[name] = tensor if spec.keep_fp32 else tensor.to(DTYPES[self.dtype])
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
