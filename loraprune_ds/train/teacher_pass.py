"""The one forward pass of the uncut model over the samples of a run that a distillation needs, on all ranks."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from loraprune_ds.checkpoint.load import TrainingCheckpoint, source_digest
from loraprune_ds.checkpoint.run_folder import TEACHER_FOLDER
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.faults import fail_point
from loraprune_ds.model.adapters import adapters_off
from loraprune_ds.model.distillation import Recording
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.output import comes_to_be_seen
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.stop import STOP
from loraprune_ds.train.teacher import Teacher, make_teacher, plan_teacher
from loraprune_ds.units import format_bytes
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.training_engine import TrainingEngine
from loraprune_ds.zero.write import LocalWrites


def find_teacher(
    config: RunConfig, prepared: Prepared, checkpoint: TrainingCheckpoint | None, comm: Communicator
) -> Teacher:
    """The teacher of a run: in its own folder, or in that of the run it goes on from. Collective.

    Raises:
        UserError: its files are not all there though the model is cut already, or will not fit on the disk.
    """
    possible = comm.all_or_raise(lambda: _possible_teachers(config, prepared, checkpoint))
    found = [replace(teacher, to_write=_missing_files(teacher, comm)) for teacher in possible]
    teacher = next((teacher for teacher in found if not teacher.to_write), found[0])
    comm.all_or_raise(lambda: _check_can_be_written(teacher, config, checkpoint))
    return teacher


def _possible_teachers(config: RunConfig, prepared: Prepared, checkpoint: TrainingCheckpoint | None) -> list[Teacher]:
    """The run's own, then that of the run it goes on from if that has another folder."""
    shape, own = prepared.pretrained.shape, Path(config.output_dir)
    plan = plan_teacher(
        config,
        prepared.samples,
        prepared.order,
        prepared.steps,
        hidden_size=shape.hidden_size,
        element_size=DTYPES[config.model.dtype].itemsize,
    )
    runs = [own]
    if checkpoint is not None and checkpoint.folder.parents[1].resolve() != own.resolve():
        runs.append(checkpoint.folder.parents[1])
    samples, source = prepared.samples.digest(), source_digest(prepared.pretrained)
    return [make_teacher(config, plan, samples=samples, source=source, folder=run / TEACHER_FOLDER) for run in runs]


def _missing_files(teacher: Teacher, comm: Communicator) -> list[int]:
    """Each looked for by one rank: a large run has 100,000 of them. Collective."""
    return sorted(chain.from_iterable(comm.gather_objects(teacher.missing(comm.rank, comm.world_size))))


def _check_can_be_written(teacher: Teacher, config: RunConfig, checkpoint: TrainingCheckpoint | None) -> None:
    if not teacher.to_write:
        return
    if checkpoint is not None and checkpoint.state.cuts:
        lost = teacher.path(teacher.to_write[0])
        raise UserError(f"{lost} is missing or damaged, and the model that would write it again is cut already")
    needed = teacher.plan.bytes * len(teacher.to_write) // teacher.plan.files
    free = shutil.disk_usage(config.output_dir).free
    if needed > free:
        raise UserError(
            f"train.distill_weight: the outputs of the uncut model need {format_bytes(needed)} in {teacher.folder}, "
            f"where {format_bytes(free)} are free; train.distill_top_k keeps less"
        )


def record_teacher(
    engine: TrainingEngine,
    teacher: Teacher,
    samples: Samples,
    config: RunConfig,
    *,
    pending: Callable[[], int],
    note: Callable[[str], None],
) -> bool:
    """Writes what was missing when the teacher was found, each file by one rank, W files at a time. Collective.

    Returns:
        False if it was asked to stop before the end; what is written stays.

    Raises:
        RunError: a rank cannot write.
    """
    comm = engine.model.comm
    comm.on_rank_0(teacher.begin)
    if not teacher.to_write:
        return True
    plan = teacher.plan
    note(
        f"the uncut model's outputs for {len(plan.samples)} samples: {format_bytes(plan.bytes)} in {teacher.folder}, "
        f"{len(teacher.to_write)} of {plan.files} files to write"
    )
    with adapters_off(engine.model.module):
        if not _write_files(engine, teacher, samples, config, pending):
            return False
    comm.all_or_raise(lambda: _wait_for_files(teacher, comm))
    return True


def _write_files(
    engine: TrainingEngine,
    teacher: Teacher,
    samples: Samples,
    config: RunConfig,
    pending: Callable[[], int],
) -> bool:
    comm, writes, missing = engine.model.comm, LocalWrites(), teacher.to_write
    for first in range(0, len(missing), comm.world_size):
        files = missing[first : first + comm.world_size]
        passes = max(-(-len(teacher.plan.members(file)) // config.recorded_at_once) for file in files)
        is_mine = comm.rank < len(files)
        file = files[comm.rank if is_mine else 0]  # out of files: as many forward passes, written nowhere
        fields = _file_content(engine, teacher, samples, config, file, passes)
        if is_mine:
            writes.do(lambda file=file, fields=fields: teacher.write(file, fields))
        fail_point("teacher.file")
        writes.agree(comm, teacher.folder)
        if max(comm.gather_objects(pending())) == STOP and first + comm.world_size < len(missing):
            return False
    return True


def _file_content(
    engine: TrainingEngine, teacher: Teacher, samples: Samples, config: RunConfig, file: int, passes: int
) -> dict[str, Tensor]:
    """All supervised tokens of a file, in so many forward passes, of which every rank makes the same number."""
    batches = teacher.plan.members(file).split(config.recorded_at_once)
    parts = []
    for i in range(passes):
        indices = batches[i if i < len(batches) else 0]
        input_ids, labels = (t[indices].long().to(engine.model.device) for t in (samples.input_ids, samples.labels))
        recording = Recording(config.train.distill_top_k)
        fields = engine.infer(input_ids=input_ids, labels=labels, distillation=recording)
        if i < len(batches):
            parts.append({name: _on_disk(tensor) for name, tensor in fields.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _wait_for_files(teacher: Teacher, comm: Communicator) -> None:
    """Until this rank sees those that it looked for in vain: its file system may remember that they were not there."""
    for file in teacher.to_write:
        if file % comm.world_size == comm.rank and not comes_to_be_seen(partial(teacher.has, file)):
            raise UserError(f"{teacher.path(file)} was written by another rank and cannot be read by this one")


def _on_disk(tensor: Tensor) -> Tensor:
    return (tensor.int() if tensor.dtype == torch.int64 else tensor).cpu()
