"""Carries out a whole run: prepare, train and cut, export, measure what was exported, report."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import RankError
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report.report import Outcome
from loraprune_ds.train.checkpoints import find_checkpoint
from loraprune_ds.train.finish import finish, write_weights
from loraprune_ds.train.loop import RunContext, TrainingLoop
from loraprune_ds.train.output import Start, check_shared, create_output
from loraprune_ds.train.prepare import Prepared, describe_run, prepare
from loraprune_ds.train.recorder import Recorder, take_over_metrics
from loraprune_ds.train.status import RunStatus
from loraprune_ds.train.stop import RequestListener, drop_stale_requests
from loraprune_ds.train.teacher import Teacher
from loraprune_ds.train.teacher_pass import find_teacher
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.half_products import fast_half_products


def run(config: RunConfig, comm: Communicator, start: Start) -> bool:
    """Carries out a run, or the rest of one, on all ranks. The results are in `config.output_dir`. Collective.

    Returns:
        False if it was asked to stop: a checkpoint is there and nothing is exported.

    Raises:
        UserError: the input cannot be used. Nothing was written yet.
        RunError: the run went wrong; status.json says how.
    """
    torch.use_deterministic_algorithms(config.train.deterministic)
    prepared = prepare(config, comm, is_first_on_node=os.environ["LOCAL_RANK"] == "0")
    warnings: list[str] = []
    checkpoint = find_checkpoint(start, config, comm, warnings)
    comm.on_rank_0(lambda: _open_output(config, start, checkpoint, warnings))
    check_shared(Path(config.output_dir), comm)
    with _open_context(config, prepared, checkpoint, comm) as context:
        for line in warnings:
            context.recorder.show(line)
        context.recorder.show(describe_run(config, prepared, comm.world_size))
        outcome = _train(config, prepared, checkpoint, context)
        finished = outcome is not None and finish(config, prepared, outcome, context)
        context.check_owner()
        context.status.end("finished" if finished else "stopped")
        comm.barrier()  # the first rank that leaves with another code than 0 makes the launcher end the others
    return finished


def _open_output(config: RunConfig, start: Start, checkpoint: TrainingCheckpoint | None, warnings: list[str]) -> None:
    """Makes `output_dir` ready for this start. On rank 0 only."""
    folder = create_output(config, is_new=start.kind == "fresh")
    warnings += drop_stale_requests(folder)
    if checkpoint:
        take_over_metrics(checkpoint, folder)


@contextmanager
def _open_context(
    config: RunConfig, prepared: Prepared, checkpoint: TrainingCheckpoint | None, comm: Communicator
) -> Iterator[RunContext]:
    """Opens what a run needs while it lasts, and closes it however the run ends."""
    folder, steps, is_rank_0 = Path(config.output_dir), prepared.steps, comm.rank == 0
    mark = comm.draw_mark()
    first = checkpoint.state.step if checkpoint else 0
    with (
        fast_half_products(config.model.dtype),
        RunStatus(folder, steps, first=first, mark=mark, rank=comm.rank, ranks=comm.world_size) as status,
        closing(Recorder(config, folder, steps, checkpoint, active=is_rank_0)) as recorder,
        closing(RequestListener(folder, watches_files=is_rank_0)) as requests,
        _full_disk_in_one_line(folder),
    ):
        yield RunContext(requests, comm, recorder, status)


@contextmanager
def _full_disk_in_one_line(folder: Path) -> Iterator[None]:
    """Makes one line of a full disk instead of a traceback: a rank's small files may have no room any more."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankError(f"{error.filename or folder} cannot be written: {error.strerror}") from None


def _train(
    config: RunConfig, prepared: Prepared, checkpoint: TrainingCheckpoint | None, context: RunContext
) -> Outcome | None:
    """Trains and cuts the model, then writes its merged weights. No engine is left afterwards. Collective.

    Returns:
        None if it was asked to stop.
    """
    teacher = _find_teacher(config, prepared, checkpoint, context)
    loop = TrainingLoop(config, prepared, checkpoint, teacher, context)
    if context.stop_requested() or not loop.run() or context.stop_requested():
        return None
    context.check_owner()
    context.recorder.show("writing the merged model")
    write_weights(loop.model, Path(config.output_dir), config.model.dtype, context.status.mark)
    loop.engine.release()  # else it would stand beside the exported model, which is measured next
    target = describe_target(config.prune, prepared.pretrained.shape, loop.model.shape)
    return Outcome(loop.model.shape, loop.pruner.kept_of_dense, loop.resumed_from, target)


def _find_teacher(
    config: RunConfig, prepared: Prepared, checkpoint: TrainingCheckpoint | None, context: RunContext
) -> Teacher | None:
    """Finds the teacher if a step is left that distills. Its files are gone once no step needs them."""
    if not config.train.distill_weight or context.status.step >= prepared.steps:
        return None
    return find_teacher(config, prepared, checkpoint, context.comm)
