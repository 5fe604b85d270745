"""Exports the pruned model of an external training."""

import tempfile
from pathlib import Path
from typing import Any, cast

from peft import PeftModel

from loraprune_ds.config import Dtype
from loraprune_ds.export.gguf_architecture import architecture_name
from loraprune_ds.export.huggingface import finish_folder, publish
from loraprune_ds.export.model_card import ModelCard
from loraprune_ds.files import staging_of, write_json
from loraprune_ds.hf.live import base_config, model_name
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.weight_files import drop_auto_maps
from loraprune_ds.pruning.step import Pruner


def finish_export(folder: Path, peft_model: PeftModel, pruner: Pruner, dtype: Dtype, step: int, tokenizer: Any) -> None:
    """Completes and publishes the export in `folder`, whose weights are written."""
    source, pruned, settings = base_config(peft_model), pruner.model.shape, pruner.config
    base, exported = cast(Any, peft_model.get_base_model()), export_config(source, pruned, dtype)
    card = ModelCard(
        base_model=model_name(peft_model),
        dense=pruner.limits.dense,
        pruned=pruned,
        criterion=settings.criterion,
        ranking=settings.ranking,
        asked=pruner.schedule.section(step).size.ratio,
        data="data of its own trainer",
        steps=step,
        perplexity_data="not measured",
        llama_cpp=architecture_name(exported.config, pruned),
    )
    with tempfile.TemporaryDirectory() as path:
        dense = Path(path)  # has the files of the dense model next to its weights
        write_json(dense / "config.json", source)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(dense)
        if tokenizer is not None:
            tokenizer.save_pretrained(dense)
            drop_auto_maps(dense)  # the trainer's user may trust a tokenizer's code; an export brings none
        finish_folder(staging_of(folder), exported, dense, card)
    publish(folder)
