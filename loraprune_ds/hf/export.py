"""Writes the results of an external training: the merged model, the base of an adapter, report and pictures."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from loraprune_ds.checkpoint.run_folder import METRICS_FILE
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.model_card import ModelCard
from loraprune_ds.files import write_json
from loraprune_ds.hf.live import PrunedTraining, base_config, model_name
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.folder_files import drop_auto_maps
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report.metrics import write_history
from loraprune_ds.report.report import Outcome
from loraprune_ds.whole import staging_of
from loraprune_ds.zero.memory import peak_bytes
from loraprune_ds.zero.write import TensorsOf, write_model


def save_results(training: PrunedTraining, folder: Path, settings: dict[str, Any]) -> None:
    """Writes report, kept groups, metrics and pictures. `settings` are more of the report's config. Collective."""
    pruner, dense, pruned = training.pruner, training.pruner.limits.dense, training.model.shape
    model = {"path": model_name(training.peft_model), "dtype": training.dtype}
    config = {"seed": training.seed, "steps": training.steps, "model": model, "prune": asdict(pruner.config)}
    target = describe_target(pruner.config, dense, pruned)
    outcome = Outcome(pruned, pruner.kept_of_dense, training.resumed_from, target)
    peaks, recorder = training.model.comm.gather_objects(peak_bytes()), training.recorder

    def write() -> None:
        write_history(folder / METRICS_FILE, recorder.history)
        recorder.write_results(folder, config | settings, dense, outcome, peaks)

    training.model.comm.on_rank_0(write)


def write_export(
    training: PrunedTraining, folder: Path, tokenizer: Any, tensors_of: TensorsOf, *, trained: bool
) -> None:
    """Writes a Hugging Face model of the tensors that `tensors_of` makes of each linear. Collective."""
    model = training.model
    model.comm.on_rank_0(lambda: begin(folder))
    write_model(model, staging_of(folder), training.dtype, tensors_of, trained=trained)
    model.comm.on_rank_0(lambda: _finish(training, folder, tokenizer))


def _finish(training: PrunedTraining, folder: Path, tokenizer: Any) -> None:
    source = base_config(training.peft_model)
    exported = export_config(source, training.model.shape, training.dtype)
    base = cast(Any, training.peft_model.get_base_model())
    with tempfile.TemporaryDirectory() as described:  # the files of the dense model next to its weights
        write_json(Path(described) / "config.json", source)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(described)
        if tokenizer is not None:
            tokenizer.save_pretrained(described)
            drop_auto_maps(Path(described))  # the trainer's user may trust a tokenizer's code; an export brings none
        card = ModelCard(
            base_model=model_name(training.peft_model),
            dense=training.pruner.limits.dense,
            pruned=training.model.shape,
            criterion=training.pruner.config.criterion,
            ranking=training.pruner.config.ranking,
            data="data of its own trainer",
            steps=training.step,
            perplexity_data="not measured",
        )
        finish_folder(staging_of(folder), exported, Path(described), card)
    publish(folder)
