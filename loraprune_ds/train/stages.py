"""The stages of a run after its training. Files join them, so each goes on alone after a kill.

train     checkpoints/step-N of the last step, and of each of `prune.sizes`
export    model-SIZE/ of each size, and the run's own model in the hidden folder .model.exported/
measure   reads that folder back, writes the report, and names the folder model/
"""

from collections.abc import Mapping
from pathlib import Path

from loraprune_ds.checkpoint.layout import CHECKPOINTS_FOLDER, step_folder
from loraprune_ds.checkpoint.load import Step, TrainingCheckpoint, keep_from_lists, open_checkpoint
from loraprune_ds.errors import UserError, fail_point
from loraprune_ds.export.huggingface import begin, publish, write_model
from loraprune_ds.export.model_card import card_of_step, write_model_card
from loraprune_ds.files import flush, remove_folder, staging_of
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.pruning.limits import shortfall
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report.records import MODEL_FOLDER, EvaluationRecord, export_folder
from loraprune_ds.report.report import Outcome, write_results
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.loop import measure_held_out
from loraprune_ds.zero.engine import build_inference_engine, release

EXPORTED = f".{MODEL_FOLDER}.exported"  # not read back yet


def drop_later_models(folder: Path, sizes: Mapping[int, str], last: int, first: int) -> list[str]:
    """Removes models that an earlier start made of steps after `first`, and returns a line for each."""
    lines = list[str]()
    for step, names in _targets(sizes, last).items():
        for path in (folder / name for name in names if step > first and (folder / name).exists()):
            remove_folder(path)
            lines.append(f"{path.name}/ of an earlier start is removed; this one makes it from step {step}")
    return lines


def _targets(sizes: Mapping[int, str], last: int) -> dict[int, list[str]]:
    """Returns the folder of the model of each step. That of the last step gets another name once it was read back."""
    return {step: [export_folder(sizes, step)] for step in sizes} | {last: [EXPORTED, MODEL_FOLDER]}


def export_models(context: RunContext) -> bool:
    """Exports each size, then the last step, unless an earlier start did. False after a request to stop. Collective."""
    for number, names in _targets(context.prepared.pruning.schedule.ends(), context.prepared.steps).items():
        if any(context.comm.gather_objects((context.folder / name).exists())[0] for name in names):
            continue
        checkpoint = _open_step(context, number)
        if checkpoint is None:
            context.recorder.show(f"{names[0]}/ is not made: the checkpoint of step {number} is not there")
            continue
        _export(context, Step(checkpoint, context.prepared.pretrained), context.folder / names[0])
        if context.stop_requested():
            return False
    return True


def _open_step(context: RunContext, step: int) -> TrainingCheckpoint | None:
    """Verifies a step and its source. Looks where the run was resumed from, too. None without the step. Collective."""
    resumed, comm = context.checkpoint, context.comm
    roots = [context.folder / CHECKPOINTS_FOLDER, *([resumed.folder.parent] if resumed else [])]
    folders = [step_folder(root, step) for root in roots if step_folder(root, step).is_dir()]
    folder = comm.gather_objects(next(iter(folders), None))[0]
    return None if folder is None else open_checkpoint(folder, comm)


def _export(context: RunContext, step: Step, target: Path) -> None:
    """Writes the model of a step. Collective."""
    comm, mark = context.comm, context.status.mark
    context.recorder.show(f"writing {'the merged model' if target.name == EXPORTED else f'{target.name}/'}")
    comm.on_rank_0(lambda: begin(target, mark))
    windows = sum(len(ids) for ids, _ in context.prepared.held_out)
    write_model(step, staging_of(target, mark), card_of_step(step, windows), comm)
    context.check_owner()

    def name() -> None:
        fail_point("export.before_rename")
        publish(target, mark)
        fail_point("export.after_rename")

    comm.on_rank_0(name)


def measure_model(context: RunContext) -> str | None:
    """Reads the exported model back, measures it, and publishes it with the report. Collective.

    Returns how far the run ends below its ratio, if it does.
    """
    config, prepared, folder, recorder = context.config, context.prepared, context.folder, context.recorder
    checkpoint = _open_step(context, prepared.steps)
    assert checkpoint is not None, "the model was exported from it"
    exported, target, dense = folder / EXPORTED, folder / MODEL_FOLDER, prepared.pretrained.shape
    # An earlier start may have been killed right after it had named the folder.
    is_named = context.comm.gather_objects(target.exists())[0]
    model = target if is_named else exported
    try:
        measured = _evaluate(model, context)
    except UserError:
        if context.comm.rank == 0:  # the next start makes it again
            remove_folder(model)
        raise
    recorder.write(measured)
    step, pruning = Step(checkpoint, prepared.pretrained), prepared.pruning
    reached = 1 - step.shape.linear_numel() / dense.linear_numel()
    outcome = Outcome(
        config=config.to_dict(),
        history=recorder.history,
        dense=dense,
        pruned=step.shape,
        kept_of_dense=keep_from_lists(checkpoint.state.kept, dense.kinds),
        resumed_from=checkpoint.state.resumed_from,
        accelerator=checkpoint.state.accelerator,
        peak_bytes=checkpoint.state.peak_bytes,
        target=describe_target(config.prune, dense, step.shape),
        sizes=pruning.schedule.ends(),
        asked=pruning.schedule.ratio,
        shortfall=shortfall(pruning.limits, pruning.schedule.ratio, reached),
    )
    context.check_owner()

    def report() -> None:
        recorder.show_pictures(write_results(folder, outcome))

    def name() -> None:
        write_model_card(exported, card_of_step(step, measured.windows, measured.perplexity), step.exported)
        fail_point("finish.before_rename")
        exported.rename(target)
        flush(folder)
        fail_point("finish.after_rename")

    context.comm.on_rank_0(report)
    context.check_owner()  # if this process stood still, another one has renamed the folder by now
    if not is_named:
        context.comm.on_rank_0(name)
    return outcome.shortfall


def _evaluate(folder: Path, context: RunContext) -> EvaluationRecord:
    """Measures the exported model, read back from disk and sharded. Collective."""
    model, prepared, comm = context.config.model, context.prepared, context.comm
    # Every rank opens it. A rank that cannot shows that output_dir is not shared.
    pretrained = comm.all_or_raise(lambda: open_pretrained(folder))
    engine = build_inference_engine(pretrained, model.attn_implementation, model.dtype, prepared.ds_config)
    record = measure_held_out(engine, prepared.held_out, comm, step=prepared.steps, name="pruned")
    release(engine)  # `evaluate.after` needs the memory
    return record
