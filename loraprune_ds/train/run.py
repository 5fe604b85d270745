"""Carries out a run, or the stages that are missing. Files join them, so each stage goes on alone after a kill.

train     checkpoints/step-N of the last step
export    the model in the hidden folder .model.exported/
measure   reads that folder back, writes the report, and names the folder model/
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from loraprune_ds.checkpoint.layout import CHECKPOINTS_FOLDER, step_folder
from loraprune_ds.checkpoint.load import TrainingCheckpoint, open_checkpoint
from loraprune_ds.errors import UserError, fail_point
from loraprune_ds.export.huggingface import begin, publish, write_model
from loraprune_ds.export.model_card import card_of_step, write_model_card
from loraprune_ds.files import flush, remove_folder, staging_of
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.weight_files import check_room
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.ranks.device import fast_half_products
from loraprune_ds.report import records
from loraprune_ds.session.results import write_results
from loraprune_ds.train.checkpoints import RunContext, check_data, find_checkpoint
from loraprune_ds.train.output import OutputFolder, RunStatus
from loraprune_ds.train.prepare import CheckTokenizer, Prepared, describe_run, prepare
from loraprune_ds.train.recorder import RunRecorder
from loraprune_ds.train.stop import RequestListener, drop_stale_requests
from loraprune_ds.train.trainer import record_perplexity, train

EXPORTED = f".{records.MODEL_FOLDER}.exported"  # not read back yet
MODELS = (EXPORTED, records.MODEL_FOLDER)


def run(output: OutputFolder, comm: Communicator, check_tokenizer: CheckTokenizer = None) -> bool:
    """Carries out a run, or the rest of one. Returns False after a request to stop, which saves. Collective.

    Args:
        check_tokenizer: as in `prepare`.

    Raises:
        UserError: the input cannot be used. Nothing was written yet.
        RunError: the run went wrong. status.json names the reason.
    """
    config = output.config
    resumes = output.start == "resume"  # every rank reads this before rank 0 makes the folder
    torch.use_deterministic_algorithms(config.train.deterministic)
    prepared = prepare(config, comm, output.continued, check_tokenizer)
    warnings: list[str] = []
    schedule = prepared.schedule
    checkpoint = find_checkpoint(output, comm, prepared.pretrained, warnings) if resumes else None
    if checkpoint:
        check_data(checkpoint, prepared)

    def open_output() -> None:
        if checkpoint is None or checkpoint.state.step < schedule.steps:
            check_room(output.path, schedule.final_numel, config.model.dtype)
        output.create(prepared.config)
        warnings.extend(_clear_earlier(output.path, prepared, checkpoint))

    comm.write_on_rank_0(output.path, open_output)
    output.check_shared(comm)
    with _open_context(prepared, checkpoint, comm) as context:
        for line in (*warnings, *describe_run(prepared, comm.world_size)):
            context.recorder.show(line)
        finished = _train(context) and export_model(context)
        error = measure_model(context) if finished else None
        context.check_owner()
        status = "finished" if finished else "stopped"
        context.status.end(status, error)
        # the launcher ends the other ranks if one exits early with a code other than 0
        comm.barrier()
    return finished


def _clear_earlier(
    folder: Path, prepared: Prepared, checkpoint: TrainingCheckpoint | None
) -> list[str]:
    """Removes requests, records and models from after the checkpoint. Returns a line for each request and model."""
    lines = drop_stale_requests(folder)
    first = 0
    history = records.History()
    if checkpoint:  # it may be in another folder, and later records may be damaged
        first = checkpoint.state.step
        history = records.read_history(checkpoint.folder.parents[1] / records.METRICS_FILE, first)
    records.write_history(folder / records.METRICS_FILE, history)
    return lines + _drop_later_models(folder, prepared.schedule.steps, first)


@contextmanager
def _open_context(
    prepared: Prepared, checkpoint: TrainingCheckpoint | None, comm: Communicator
) -> Iterator[RunContext]:
    config = prepared.config
    steps = prepared.schedule.steps
    rank = comm.rank
    folder = Path(config.output_dir)
    mark = comm.draw_mark()
    resumed_from = checkpoint.state.step if checkpoint else None
    first = resumed_from or 0
    is_rank_0 = rank == 0
    with (
        fast_half_products(config.model.dtype),
        RunStatus(
            folder, steps, first=first, mark=mark, rank=rank, ranks=comm.world_size
        ) as status,
        closing(RunRecorder(config, steps, resumed_from, active=is_rank_0)) as recorder,
        closing(RequestListener(folder, watches_files=is_rank_0)) as requests,
    ):
        yield RunContext(prepared, checkpoint, comm, requests, recorder, status)


def _train(context: RunContext) -> bool:
    """Trains and cuts the model, up to its last step. Returns False after a request to stop. Collective."""
    if context.stop_requested():
        return False
    if context.status.step < context.prepared.schedule.steps and not train(context):
        return False
    return not context.stop_requested()


def _drop_later_models(folder: Path, last: int, first: int) -> list[str]:
    """Removes the model that an earlier start made of a step after `first`, and returns a line for it."""
    lines = list[str]()
    for name in MODELS:
        if first < last and (folder / name).exists():
            remove_folder(folder / name)
            lines.append(
                f"{name}/ of an earlier start is removed; this one makes it from step {last}"
            )
    return lines


def export_model(context: RunContext) -> bool:
    """Exports the last step, unless an earlier start did. Returns False after a request to stop. Collective."""
    comm = context.comm
    folder = context.folder
    if comm.from_rank_0(any((folder / name).exists() for name in MODELS)):
        return True
    checkpoint = _open_last_step(context)
    target = folder / EXPORTED
    mark = context.status.mark
    context.recorder.show("writing the merged model")
    comm.write_on_rank_0(folder, lambda: begin(target, mark))
    windows = sum(len(ids) for ids, _ in context.prepared.held_out)
    write_model(checkpoint, staging_of(target, mark), card_of_step(checkpoint, windows), comm)
    context.check_owner()

    def publish_target() -> None:
        fail_point("export.before_rename")
        publish(target, mark)
        fail_point("export.after_rename")

    comm.write_on_rank_0(folder, publish_target)
    return not context.stop_requested()


def _open_last_step(context: RunContext) -> TrainingCheckpoint:
    """Verifies the last step and its source. It may be where the run was resumed from. Collective."""
    step = context.prepared.schedule.steps
    roots = [context.folder / CHECKPOINTS_FOLDER]
    if context.checkpoint:
        roots.append(context.checkpoint.folder.parent)
    folder = next(filter(Path.is_dir, (step_folder(root, step) for root in roots)), None)
    folder = context.comm.from_rank_0(folder)
    assert folder is not None, "the training has ended with this step"
    return open_checkpoint(folder, context.comm, context.prepared.pretrained)


def measure_model(context: RunContext) -> str | None:
    """Reads the exported model back, measures it, and publishes it with the report. Collective.

    Returns how far the run ends below its ratio, if it does.
    """
    schedule = context.prepared.schedule
    folder = context.folder
    comm = context.comm
    checkpoint = _open_last_step(context)
    exported = folder / EXPORTED
    target = folder / records.MODEL_FOLDER
    # An earlier start may have been killed right after it had named the folder.
    is_named = comm.from_rank_0(target.exists())
    model = target if is_named else exported
    try:
        measured = _read_back(model, context)
    except UserError:
        if comm.rank == 0:  # the next start makes it again
            remove_folder(model)
        raise
    context.check_owner()

    def publish_model() -> None:
        card = card_of_step(checkpoint, measured.windows, measured.perplexity)
        write_model_card(exported, card, checkpoint.exported)
        fail_point("finish.before_rename")
        exported.rename(target)
        flush(folder)
        fail_point("finish.after_rename")

    config = context.config.to_dict()
    write_results(folder, checkpoint.state, schedule, context.recorder, config, comm)
    context.check_owner()  # if this process stood still, another one has renamed the folder by now
    if not is_named:
        comm.write_on_rank_0(folder, publish_model)
    return schedule.goal.shortfall(checkpoint.shape)


def _read_back(folder: Path, context: RunContext) -> records.EvaluationRecord:
    """Measures the exported model, read back from disk. Collective."""
    model = context.config.model
    prepared = context.prepared
    # Every rank opens it. A rank that cannot shows that output_dir is not shared.
    pretrained = context.comm.all_or_raise(lambda: open_pretrained(folder))
    engine = prepared.engine.build_inference_engine(
        pretrained, model.attn_implementation, model.dtype, prepared.ds_config
    )
    record = record_perplexity(context, engine.infer, prepared.schedule.steps, "pruned")
    engine.release()  # `evaluate.after` needs the memory
    return record
