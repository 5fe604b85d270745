"""Carries out a whole run: prepare, train and cut, export, measure the export, report."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from loraprune_ds.checkpoint.layout import MODEL_FOLDER
from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.errors import RankError, fail_point
from loraprune_ds.export.huggingface import finish_folder, publish
from loraprune_ds.export.model_card import ModelCard, write_model_card
from loraprune_ds.files import staging_of
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.pruning.limits import shortfall
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report.records import EvaluationRecord
from loraprune_ds.report.report import Outcome, write_results
from loraprune_ds.train.checkpoints import check_data, find_checkpoint
from loraprune_ds.train.context import RunContext, RunStatus
from loraprune_ds.train.loop import (
    TrainingLoop,
    exported_config,
    make_card,
    measure_held_out,
    take_over_sizes,
    write_weights,
)
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.prepare import Prepared, describe_run, prepare
from loraprune_ds.train.recorder import RunRecorder, take_over_metrics
from loraprune_ds.train.stop import RequestListener, drop_stale_requests
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import device_name, fast_half_products, peak_bytes
from loraprune_ds.zero.engine import build_inference_engine, release


def run(output: OutputFolder, comm: Communicator) -> bool:
    """Carries out a run, or the rest of one. Returns False after a request to stop, which saves. Collective.

    Raises:
        UserError: the input cannot be used. Nothing was written yet.
        RunError: the run went wrong. status.json names the reason.
    """
    config = output.config
    resumes = output.start == "resume"  # every rank reads this before rank 0 makes the folder
    torch.use_deterministic_algorithms(config.train.deterministic)
    prepared = prepare(config, comm, output.commits, is_first_on_node=os.environ["LOCAL_RANK"] == "0")
    warnings: list[str] = []
    checkpoint = find_checkpoint(output, comm, warnings) if resumes else None
    if checkpoint:
        check_data(checkpoint, prepared)

    def open_output() -> None:
        output.create(prepared.config)
        warnings.extend(drop_stale_requests(output.path))
        if checkpoint:
            take_over_metrics(checkpoint, output.path)
        ends, first = prepared.pruning.schedule.ends(), checkpoint.state.step if checkpoint else 0
        warnings.extend(take_over_sizes(output.path, ends, first))

    comm.on_rank_0(open_output)
    output.check_shared(comm)
    with _open_context(prepared, checkpoint, comm) as context:
        for line in warnings:
            context.recorder.show(line)
        context.recorder.show(describe_run(prepared, comm.world_size))
        outcome = _train(context)
        finished = outcome is not None and _finish(context, outcome)
        context.check_owner()
        context.status.end("finished" if finished else "stopped", outcome.shortfall if outcome and finished else None)
        comm.barrier()  # the launcher ends the other ranks if one exits early with a code other than 0
    return finished


@contextmanager
def _open_context(
    prepared: Prepared, checkpoint: TrainingCheckpoint | None, comm: Communicator
) -> Iterator[RunContext]:
    config, steps, is_rank_0 = prepared.config, prepared.steps, comm.rank == 0
    folder = Path(config.output_dir)
    mark = comm.draw_mark()
    first = checkpoint.state.step if checkpoint else 0
    with (
        fast_half_products(config.model.dtype),
        RunStatus(folder, steps, first=first, mark=mark, rank=comm.rank, ranks=comm.world_size) as status,
        closing(RunRecorder(folder, steps, checkpoint, config.logging, config.to_dict(), active=is_rank_0)) as recorder,
        closing(RequestListener(folder, watches_files=is_rank_0)) as requests,
        _full_disk_in_one_line(folder),
    ):
        yield RunContext(prepared, checkpoint, comm, requests, recorder, status)


@contextmanager
def _full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Turns a full disk into one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankError(f"{error.filename or folder} cannot be written: {error.strerror}") from None


def _train(context: RunContext) -> Outcome | None:
    """Trains and cuts the model, then writes its merged weights. None after a request to stop. Collective."""
    loop = TrainingLoop(context)
    if context.stop_requested() or not loop.run() or context.stop_requested():
        return None
    context.check_owner()
    context.recorder.show("writing the merged model")
    write_weights(context, loop.model, context.folder / MODEL_FOLDER)
    loop.release()  # frees memory for the exported model, which is measured next
    config, dense, pruning = context.config, context.prepared.pretrained.shape, context.prepared.pruning
    return Outcome(
        config=config.to_dict(),
        history=context.recorder.history,
        dense=dense,
        pruned=loop.model.shape,
        kept_of_dense=loop.pruner.kept_of_dense,
        resumed_from=context.resumed_from,
        accelerator=device_name(),
        target=describe_target(config.prune, dense, loop.model.shape),
        sizes=pruning.schedule.ends(),
        asked=pruning.schedule.ratio,
        shortfall=shortfall(pruning.limits, pruning.schedule.ratio, loop.pruner.reached()),
    )


def _finish(context: RunContext, outcome: Outcome) -> bool:
    """Completes the exported model, measures it, and publishes it with the report. False after a request to stop."""
    comm, recorder, folder = context.comm, context.recorder, context.folder
    mark, dense = context.status.mark, context.prepared.pretrained
    staging = staging_of(folder / MODEL_FOLDER, mark)
    exported = exported_config(context, outcome.pruned)

    def card() -> ModelCard:
        return make_card(context, outcome.pruned, context.prepared.steps, "pruned")

    comm.on_rank_0(lambda: finish_folder(staging, exported, dense.folder, card()))
    if context.stop_requested():
        return False
    recorder.write(_evaluate_exported(staging, context))
    outcome = replace(outcome, peak_bytes=comm.gather_objects(peak_bytes()))
    context.check_owner()

    def publish_all() -> None:
        write_model_card(staging, card(), exported)
        fail_point("finish.before_rename")
        publish(folder / MODEL_FOLDER, mark)
        fail_point("finish.after_rename")
        recorder.show_pictures(write_results(folder, outcome))

    comm.on_rank_0(publish_all)
    return True


def _evaluate_exported(staging: Path, context: RunContext) -> EvaluationRecord:
    """Measures the exported model, read back from disk and sharded. Collective."""
    config, prepared, comm = context.config, context.prepared, context.comm
    # Every rank opens it. A rank that cannot shows that output_dir is not shared.
    pretrained = comm.all_or_raise(lambda: open_pretrained(staging))
    model = config.model
    engine = build_inference_engine(pretrained, model.attn_implementation, model.dtype, prepared.ds_config)
    record = measure_held_out(engine, prepared.held_out, comm, step=prepared.steps, name="pruned")
    release(engine)  # `evaluate.after` needs the memory
    return record
