"""Exports models of a run: the final one in `model/`, and one for each earlier size in `model-<size>/`."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from loraprune_ds.checkpoint.layout import export_folder
from loraprune_ds.errors import fail_point
from loraprune_ds.export.gguf_architecture import architecture_name
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.model_card import ModelCard, card_of_run
from loraprune_ds.files import remove_folder, staging_of
from loraprune_ds.model.exported_config import ExportedConfig, export_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.report.records import EvaluationName
from loraprune_ds.train.context import RunContext
from loraprune_ds.zero.sharded import ShardedModel
from loraprune_ds.zero.write import merged_tensors, write_sharded_model


def write_weights(context: RunContext, model: ShardedModel, target: Path) -> None:
    """Writes the weights with LoRA merged into the staging folder of `target`. Collective."""
    mark, dtype = context.status.mark, context.config.model.dtype

    def make_room() -> None:
        if target.exists():  # from a process that was killed before its report
            shutil.rmtree(target)
        begin(target, mark)

    model.comm.on_rank_0(make_room)
    tower, staging = context.prepared.pretrained.tower, staging_of(target, mark)
    write_sharded_model(model, staging, dtype, lambda linear: merged_tensors(linear, dtype), tower=tower)


def exported_config(context: RunContext, pruned: ModelShape) -> ExportedConfig:
    """Makes the config of a model that the run exports."""
    dense = context.prepared.pretrained
    return export_config(dense.config, pruned, context.config.model.dtype, dense.tower and dense.tower.config)


def export_size(context: RunContext, model: ShardedModel, step: int) -> None:
    """Exports the model of a size that ends at `step`, unless an earlier start did. Collective."""
    mark, dense = context.status.mark, context.prepared.pretrained
    target = context.folder / export_folder(context.prepared.pruning.schedule.ends(), step)
    if model.comm.gather_objects(target.exists())[0]:
        return
    context.recorder.show(f"writing {target.name}/")
    write_weights(context, model, target)
    exported, card = exported_config(context, model.shape), make_card(context, model.shape, step, "size")
    context.check_owner()

    def publish_size() -> None:
        finish_folder(staging_of(target, mark), exported, dense.folder, card)
        fail_point("size.before_rename")
        publish(target, mark)
        fail_point("size.after_rename")

    model.comm.on_rank_0(publish_size)


def take_over_sizes(folder: Path, ends: Mapping[int, str], first: int) -> list[str]:
    """Removes models of later sizes that an earlier start left. Returns lines about these and about missing ones.

    Args:
        first: the step that this start goes on from.
    """
    lines = list[str]()
    for step, target in ((step, folder / export_folder(ends, step)) for step in ends if step != max(ends)):
        if step > first and target.exists():
            remove_folder(target)
            lines.append(f"{target.name}/ of an earlier start is removed; this one makes it after step {step}")
        elif step < first and not target.exists():
            over = f"this start makes none, because it goes on from step {first}"
            lines.append(f"{target} is missing: {over}; launch/export.py makes it of a checkpoint of step {step}")
    return lines


def make_card(context: RunContext, pruned: ModelShape, step: int, measured: EvaluationName) -> ModelCard:
    """Makes an export's README, with the perplexities known so far. `measured` names the one of the export."""
    prepared, history = context.prepared, context.recorder.history
    return card_of_run(
        context.config,
        prepared.pretrained.shape,
        pruned,
        asked=prepared.pruning.schedule.section(step).size.ratio,
        llama_cpp=architecture_name(exported_config(context, pruned).config, pruned),
        steps=step,
        windows=sum(len(ids) for ids, _ in prepared.held_out),
        perplexity_dense=history.perplexity("dense"),
        perplexity_pruned=history.perplexity(measured),
    )
