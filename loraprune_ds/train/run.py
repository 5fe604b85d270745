"""Carries out a whole run, or the stages that are missing: train and cut, export, measure and report (stages.py)."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.errors import RankError
from loraprune_ds.train.checkpoints import check_data, find_checkpoint
from loraprune_ds.train.context import RunContext, RunStatus
from loraprune_ds.train.loop import TrainingLoop
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.prepare import CheckTokenizer, Prepared, describe_run, prepare
from loraprune_ds.train.recorder import RunRecorder, take_over_metrics
from loraprune_ds.train.stages import drop_later_models, export_models, measure_model
from loraprune_ds.train.stop import RequestListener, drop_stale_requests
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import fast_half_products


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
    is_first = os.environ["LOCAL_RANK"] == "0"
    prepared = prepare(config, comm, output.commits, is_first_on_node=is_first, check_tokenizer=check_tokenizer)
    warnings: list[str] = []
    checkpoint = find_checkpoint(output, comm, warnings) if resumes else None
    if checkpoint:
        check_data(checkpoint, prepared)

    def open_output() -> None:
        output.create(prepared.config)
        warnings.extend(drop_stale_requests(output.path))
        if checkpoint:
            take_over_metrics(checkpoint, output.path)
        sizes, first = prepared.pruning.schedule.ends(), checkpoint.state.step if checkpoint else 0
        warnings.extend(drop_later_models(output.path, sizes, prepared.steps, first))

    comm.on_rank_0(open_output)
    output.check_shared(comm)
    with _open_context(prepared, checkpoint, comm) as context:
        for line in warnings:
            context.recorder.show(line)
        context.recorder.show(describe_run(prepared, comm.world_size))
        finished = _train(context) and export_models(context)
        shortfall = measure_model(context) if finished else None
        context.check_owner()
        context.status.end("finished" if finished else "stopped", shortfall)
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


def _train(context: RunContext) -> bool:
    """Trains and cuts the model, up to its last step. Returns False after a request to stop. Collective."""
    if context.stop_requested():
        return False
    if context.status.step < context.prepared.steps:
        loop = TrainingLoop(context)
        if not loop.run():
            return False
        loop.release()  # frees memory for the exported model, which is measured next
    return not context.stop_requested()
