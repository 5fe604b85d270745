"""Finishes a run whose training is over: exports the model, measures the export, and reports."""

import shutil
from pathlib import Path

from loraprune_ds.checkpoint.run_folder import MODEL_FOLDER, TEACHER_FOLDER
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.lora import merged_tensors
from loraprune_ds.export.model_card import ModelCard, card_of_run, write_model_card
from loraprune_ds.faults import fail_point
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.report.records import EvaluationRecord
from loraprune_ds.report.report import Outcome
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.loop import measure_held_out
from loraprune_ds.whole import staging_of
from loraprune_ds.zero.engine import build_inference_engine
from loraprune_ds.zero.memory import peak_bytes
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import write_model


def write_weights(context: RunContext, model: ShardedModel) -> None:
    """Writes the weights with LoRA merged in, into the staging folder of `model/`. Collective."""
    target, mark, dtype = context.folder / MODEL_FOLDER, context.status.mark, context.config.model.dtype

    def make_room() -> None:
        if target.exists():  # of a process that was killed before its report
            shutil.rmtree(target)
        begin(target, mark)

    model.comm.on_rank_0(make_room)
    write_model(model, staging_of(target, mark), dtype, lambda linear: merged_tensors(linear, dtype))


def finish(context: RunContext, outcome: Outcome) -> bool:
    """Completes the exported model, measures it, and publishes it with the report. False if asked to stop before."""
    config, comm, recorder, folder = context.config, context.comm, context.recorder, context.folder
    mark, dense = context.status.mark, context.prepared.pretrained
    staging = staging_of(folder / MODEL_FOLDER, mark)
    exported = export_config(dense.config, outcome.pruned, config.model.dtype)
    comm.on_rank_0(lambda: finish_folder(staging, exported, dense.folder, _model_card(context, outcome)))
    if context.stop_requested():
        return False
    recorder.write(_evaluate_exported(staging, context))
    peaks = comm.gather_objects(peak_bytes())
    context.check_owner()

    def publish_all() -> None:
        write_model_card(staging, _model_card(context, outcome), exported)
        fail_point("finish.before_rename")
        publish(folder / MODEL_FOLDER, mark)
        fail_point("finish.after_rename")
        recorder.write_results(folder, config.to_dict(), dense.shape, outcome, peaks)
        shutil.rmtree(folder / TEACHER_FOLDER, ignore_errors=True)  # no step needs it any more

    comm.on_rank_0(publish_all)
    return True


def _evaluate_exported(staging: Path, context: RunContext) -> EvaluationRecord:
    """Measures the exported model, read back from disk and sharded. Collective."""
    config, prepared, comm = context.config, context.prepared, context.comm
    # Every rank opens it: if one cannot, output_dir is not shared.
    pretrained = comm.all_or_raise(lambda: open_pretrained(staging))
    model, batch_size = config.model, config.evaluate.batch_size
    engine = build_inference_engine(pretrained, model.attn_implementation, model.dtype, prepared.ds_config)
    return measure_held_out(engine, prepared.windows, batch_size, comm, step=prepared.steps, name="pruned")


def _model_card(context: RunContext, outcome: Outcome) -> ModelCard:
    """Makes the export's README, with the perplexities known so far."""
    prepared, history = context.prepared, context.recorder.history
    return card_of_run(
        context.config,
        prepared.pretrained.shape,
        outcome.pruned,
        steps=prepared.steps,
        windows=len(prepared.windows),
        perplexity_dense=history.perplexity("dense"),
        perplexity_pruned=history.perplexity("pruned"),
    )
