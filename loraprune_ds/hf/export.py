"""Writes the results of an external training: the merged model, the base of an adapter, report and pictures."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from loraprune_ds.checkpoint.run_folder import METRICS_FILE
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.lora import merged_tensors
from loraprune_ds.export.model_card import ModelCard
from loraprune_ds.files import read_json, write_json
from loraprune_ds.hf.live import PrunedTraining, base_config, model_name
from loraprune_ds.model.adapters import ADAPTER_FILE
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.folder_files import drop_auto_maps
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report.metrics import write_history
from loraprune_ds.report.report import Outcome
from loraprune_ds.whole import staging_of
from loraprune_ds.zero.memory import peak_bytes
from loraprune_ds.zero.write import TensorsOf, frozen_tensors, write_model


def save_merged(training: PrunedTraining, folder: Path, tokenizer: Any) -> None:
    """Writes a Hugging Face model with LoRA merged in fp32 and rounded once. Collective."""
    _write(training, folder, tokenizer, lambda linear: merged_tensors(linear, training.dtype), trained=True)


def save_base(training: PrunedTraining, folder: Path, adapter: Path | None, tokenizer: Any) -> None:
    """Writes the pruned model without LoRA, and makes the adapter in a folder name it as its base. Collective.

    The live adapter cannot name it. PEFT reads the base's config at each save by the class of the dense model, which
    refuses layers of different sizes.
    """
    comm, path = training.model.comm, None if adapter is None else adapter / ADAPTER_FILE
    described = None if path is None else comm.on_rank_0(lambda: read_json(path))
    _write(training, folder, tokenizer, frozen_tensors, trained=False)
    if path is not None:
        named = {**(described or {}), "base_model_name_or_path": str(folder)}
        comm.on_rank_0(lambda: write_json(path, named))


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


def _write(training: PrunedTraining, folder: Path, tokenizer: Any, tensors_of: TensorsOf, *, trained: bool) -> None:
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
            perplexity_dense=None,
            perplexity_pruned=None,
        )
        finish_folder(staging_of(folder), exported, Path(described), card)
    publish(folder)
