"""A whole run: prepare, measure the dense model, train and cut, export, measure what was exported, report."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.checkpoint.run_folder import MODEL_FOLDER, TEACHER_FOLDER
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import RunError
from loraprune_ds.export.from_ranks import write_merged_weights
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.prunable_model import LayerKeep
from loraprune_ds.train.checkpoints import find_checkpoint
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.finish import describe_model, model_card, publish_model, start_model
from loraprune_ds.train.loop import Loop, measure
from loraprune_ds.train.output import RunStatus, Start, check_shared, create_output
from loraprune_ds.train.prepare import Prepared, describe_run, prepare
from loraprune_ds.train.recorder import Recorder, take_over_metrics
from loraprune_ds.train.records import EvaluationRecord
from loraprune_ds.train.report import Outcome
from loraprune_ds.train.stop import Requests, drop_stale_requests
from loraprune_ds.train.teacher_pass import find_teacher
from loraprune_ds.whole import staging_of
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.engine import build_inference_engine
from loraprune_ds.zero.half_products import fast_half_products
from loraprune_ds.zero.memory import peak_bytes


def run(config: RunConfig, comm: Communicator, start: Start) -> bool:
    """Carries out a run, or the rest of one, on all ranks; the results are in `config.output_dir`. Collective.

    Returns:
        False if it was asked to stop: a checkpoint is there and nothing is exported.

    Raises:
        UserError: unusable input, before anything was written.
        RunError: the run went wrong; status.json says how.
    """
    prepared = prepare(config, comm, is_first_on_node=os.environ["LOCAL_RANK"] == "0")
    warnings: list[str] = []
    checkpoint = find_checkpoint(start, config, comm, warnings)
    first = checkpoint.state.step if checkpoint else 0
    writes = comm.rank == 0
    folder = Path(config.output_dir)
    comm.on_rank_0(lambda: _open_output(config, checkpoint, warnings))
    check_shared(folder, comm)
    with (
        fast_half_products(config.model.dtype),
        RunStatus(folder, prepared.steps, first=first, writes=writes) as status,
        closing(Recorder(config, folder, prepared.steps, checkpoint, active=writes)) as recorder,
        closing(Requests(folder, watches_files=writes)) as requests,
        _full_disk_is_told(folder),
    ):
        for line in warnings:
            recorder.warn(line)
        recorder.note(describe_run(config, prepared, comm.world_size))
        context = RunContext(requests, comm, recorder, status)
        trained = _train(config, prepared, checkpoint, context)
        finished = trained is not None and _finish(config, prepared, trained, context)
        status.end("finished" if finished else "stopped")
        comm.barrier()  # the first rank that leaves with another code than 0 makes the launcher end the others
    return finished


@contextmanager
def _full_disk_is_told(folder: Path) -> Iterator[None]:
    """Rank 0's small files can be what does not fit any more: one line, not a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"output_dir {folder} cannot be written: {error.strerror}") from None


def _open_output(config: RunConfig, checkpoint: TrainingCheckpoint | None, warnings: list[str]) -> None:
    folder = create_output(config)
    warnings += drop_stale_requests(folder)
    if checkpoint:
        take_over_metrics(checkpoint, folder)


@dataclass(frozen=True)
class Trained:
    """What is left of training once the engine is gone."""

    staging: Path
    pruned: ModelShape
    kept_of_dense: list[LayerKeep]
    resumed_from: list[int]


def _train(
    config: RunConfig, prepared: Prepared, checkpoint: TrainingCheckpoint | None, context: RunContext
) -> Trained | None:
    """Trains and cuts, then writes the merged weights; None if it was asked to stop. No engine is left afterwards."""
    step = context.status.step
    distills = config.train.distill_weight and step < prepared.steps  # the files are gone once no step needs them
    teacher = find_teacher(config, prepared, checkpoint, context.comm) if distills else None
    loop = Loop(config, prepared, checkpoint, teacher, context)
    if context.stop_requested() or not loop.run() or context.stop_requested():
        return None
    context.recorder.note("writing the merged model")
    model, folder = loop.model, Path(config.output_dir)
    model.comm.on_rank_0(lambda: start_model(folder))
    staging = staging_of(folder / MODEL_FOLDER)
    write_merged_weights(model, staging, config.model.dtype)
    loop.engine.release()  # the exported model, which is measured next, would stand beside it
    return Trained(staging, model.shape, loop.pruner.kept_of_dense, loop.resumed_from)


def _finish(config: RunConfig, prepared: Prepared, trained: Trained, context: RunContext) -> bool:
    """Reads the exported model back, measures it, and publishes it with the report; False if it was asked to stop."""
    comm, recorder = context.comm, context.recorder
    folder = Path(config.output_dir)
    card = model_card(config, prepared, trained.pruned, recorder.history)
    comm.on_rank_0(lambda: describe_model(trained.staging, config, prepared, card))
    if context.stop_requested():
        return False
    recorder.write(_measure_exported(config, prepared, trained.staging, comm))
    outcome = Outcome(
        trained.pruned, trained.kept_of_dense, comm.gather_objects(peak_bytes()), comm.world_size, trained.resumed_from
    )
    comm.on_rank_0(lambda: publish_model(trained.staging, folder, config, prepared, outcome, recorder.history))
    if comm.rank == 0:
        shutil.rmtree(folder / TEACHER_FOLDER, ignore_errors=True)
    return True


def _measure_exported(config: RunConfig, prepared: Prepared, folder: Path, comm: Communicator) -> EvaluationRecord:
    """Perplexity of the exported model, read back from disk as anyone would read it, but sharded."""
    pretrained = comm.all_or_raise(lambda: open_pretrained(folder))  # on every node, or output_dir is not shared
    engine = build_inference_engine(
        pretrained, config.model.attn_implementation, config.model.dtype, prepared.ds_config
    )
    return measure(engine, config, prepared, comm, step=prepared.steps, name="pruned")
