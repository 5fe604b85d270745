"""Finishes a run whose training is over: exports the model, measures the export, and reports."""

import shutil
from pathlib import Path

from loraprune_ds.checkpoint.run_folder import (
    KEPT_GROUPS_PICTURE,
    MODEL_FOLDER,
    ROUTER_PICTURE,
    TEACHER_FOLDER,
    TRAINING_PICTURE,
)
from loraprune_ds.config import Dtype, RunConfig
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.lora import merged_tensors
from loraprune_ds.export.model_card import ModelCard, card_of_run, write_model_card
from loraprune_ds.faults import fail_point
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.report.pictures import draw_kept_groups, draw_training
from loraprune_ds.report.records import EvaluationRecord, History
from loraprune_ds.report.report import Outcome, make_report, write_kept_groups, write_report
from loraprune_ds.report.router_picture import draw_router_load
from loraprune_ds.train.loop import RunContext, measure_held_out
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.whole import staging_of
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import device_name
from loraprune_ds.zero.engine import build_inference_engine
from loraprune_ds.zero.memory import peak_bytes
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import write_model


def write_weights(model: ShardedModel, folder: Path, dtype: Dtype, mark: str) -> None:
    """Writes the weights, with LoRA merged in, into the staging folder of `model/`. Collective.

    Args:
        mark: of this start, so that no other process writes into the same folder.
    """
    model.comm.on_rank_0(lambda: _begin_model(folder, mark))
    write_model(model, staging_of(folder / MODEL_FOLDER, mark), dtype, lambda linear: merged_tensors(linear, dtype))


def finish(config: RunConfig, prepared: Prepared, outcome: Outcome, context: RunContext) -> bool:
    """Completes the exported model, measures it, and publishes it with the report. Collective.

    Returns:
        False if it was asked to stop before anything was published.
    """
    comm, recorder, mark = context.comm, context.recorder, context.status.mark
    staging = staging_of(Path(config.output_dir) / MODEL_FOLDER, mark)
    comm.on_rank_0(lambda: _describe_model(staging, config, prepared, outcome.pruned, recorder.history))
    if context.stop_requested():
        return False
    recorder.write(_evaluate_exported(staging, config, prepared, comm))
    peaks = comm.gather_objects(peak_bytes())
    context.check_owner()
    comm.on_rank_0(lambda: _publish(mark, config, prepared, outcome, peaks, recorder.history))
    recorder.show_pictures([Path(config.output_dir) / name for name in (TRAINING_PICTURE, KEPT_GROUPS_PICTURE)])
    return True


def _begin_model(folder: Path, mark: str) -> None:
    """Makes the staging folder of `model/`.

    A model that is there already belongs to a process that was killed before its report.
    """
    if (folder / MODEL_FOLDER).exists():
        shutil.rmtree(folder / MODEL_FOLDER)
    begin(folder / MODEL_FOLDER, mark)


def _describe_model(staging: Path, config: RunConfig, prepared: Prepared, pruned: ModelShape, history: History) -> None:
    """Writes everything of the exported model but its weights."""
    card = _model_card(config, prepared, pruned, history)
    finish_folder(staging, _exported(config, prepared, pruned), prepared.pretrained.folder, card)


def _evaluate_exported(staging: Path, config: RunConfig, prepared: Prepared, comm: Communicator) -> EvaluationRecord:
    """Measures the exported model, read back from disk as anyone would read it, but sharded. Collective."""
    model = config.model
    # Every rank opens it: if one cannot, output_dir is not shared.
    pretrained = comm.all_or_raise(lambda: open_pretrained(staging))
    engine = build_inference_engine(pretrained, model.attn_implementation, model.dtype, prepared.ds_config)
    return measure_held_out(
        engine, prepared.windows, config.evaluate.batch_size, comm, step=prepared.steps, name="pruned"
    )


def _publish(
    mark: str, config: RunConfig, prepared: Prepared, outcome: Outcome, peaks: list[int], history: History
) -> None:
    """Writes the final model card, gives `model/` its name, and writes report, kept groups and pictures."""
    folder, dense = Path(config.output_dir), prepared.pretrained.shape
    card = _model_card(config, prepared, outcome.pruned, history)
    write_model_card(staging_of(folder / MODEL_FOLDER, mark), card, _exported(config, prepared, outcome.pruned))
    fail_point("finish.before_rename")
    publish(folder / MODEL_FOLDER, mark)
    fail_point("finish.after_rename")
    write_kept_groups(folder, outcome.kept_of_dense, dense)
    write_report(folder, make_report(config.to_dict(), history, dense, outcome, peaks, device_name()))
    fail_point("finish.reported")
    draw_kept_groups(folder / KEPT_GROUPS_PICTURE, dense, outcome.kept_of_dense)
    draw_training(folder / TRAINING_PICTURE, history)
    draw_router_load(folder / ROUTER_PICTURE, dense, outcome.kept_of_dense, history)
    shutil.rmtree(folder / TEACHER_FOLDER, ignore_errors=True)  # no step needs it any more


def _exported(config: RunConfig, prepared: Prepared, pruned: ModelShape) -> ExportedConfig:
    return export_config(prepared.pretrained.config, pruned, config.model.dtype)


def _model_card(config: RunConfig, prepared: Prepared, pruned: ModelShape, history: History) -> ModelCard:
    """Makes the export's README, with the perplexities known so far."""
    return card_of_run(
        config,
        prepared.pretrained.shape,
        pruned,
        steps=prepared.steps,
        windows=len(prepared.windows),
        perplexity_dense=history.perplexity("dense"),
        perplexity_pruned=history.perplexity("pruned"),
    )
