"""Makes the forward pass of the dense model over the samples of a run, which a distillation needs, on all ranks."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from loraprune_ds.checkpoint.layout import TEACHER_FOLDER
from loraprune_ds.checkpoint.load import source_digest
from loraprune_ds.errors import UserError, fail_point
from loraprune_ds.model.adapters import adapters_off
from loraprune_ds.model.frozen import DTYPES, describe_dtype
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.output import wait_until_seen
from loraprune_ds.train.stop import STOP
from loraprune_ds.train.teacher import Teacher, plan_teacher
from loraprune_ds.units import format_bytes
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.training_engine import TrainingEngine
from loraprune_ds.zero.write import LocalWrites


def find_teacher(context: RunContext) -> Teacher:
    """Finds the teacher of a run in its own folder, or in the folder of the run it resumes. Collective.

    Raises:
        UserError: files are missing though the model is cut already, or they will not fit on the disk.
    """
    comm = context.comm
    possible = comm.all_or_raise(lambda: _possible_teachers(context))
    candidates: list[Teacher] = []
    for teacher in possible:  # a large run has 100,000 files, so the ranks share the work
        missing = comm.gather_objects(teacher.missing(comm.rank, comm.world_size))
        candidates.append(replace(teacher, to_write=sorted(chain.from_iterable(missing))))
    teacher = next((teacher for teacher in candidates if not teacher.to_write), candidates[0])
    comm.all_or_raise(lambda: _check_can_be_written(teacher, context))
    return teacher


def _possible_teachers(context: RunContext) -> list[Teacher]:
    """Describes the run's own teacher, then the teacher of the run it resumes if that has another folder."""
    config, prepared, checkpoint = context.config, context.prepared, context.checkpoint
    hidden_size, element_size = prepared.pretrained.shape.hidden_size, DTYPES[config.model.dtype].itemsize
    plan = plan_teacher(config.train, prepared.samples, prepared.order, prepared.steps, hidden_size, element_size)
    origin = {
        "samples": prepared.samples.digest(),
        "source": source_digest(prepared.pretrained),
        "dtype": describe_dtype(config.model),
        "seed": config.seed,
    }
    own = Teacher(context.folder / TEACHER_FOLDER, plan, config.train.distill_weight, origin)
    earlier = own if checkpoint is None else replace(own, folder=checkpoint.folder.parents[1] / TEACHER_FOLDER)
    return [own] if earlier.folder.resolve() == own.folder.resolve() else [own, earlier]


def _check_can_be_written(teacher: Teacher, context: RunContext) -> None:
    if not teacher.to_write:
        return
    if context.checkpoint is not None and context.checkpoint.state.cuts:
        lost = teacher.path(teacher.to_write[0])
        raise UserError(f"{lost} is missing or damaged, and the model that would write it again is cut already")
    needed = teacher.plan.bytes * len(teacher.to_write) // teacher.plan.files
    free = shutil.disk_usage(context.folder).free
    if needed > free:
        raise UserError(
            f"train.distill_weight: the outputs of the dense model need {format_bytes(needed)} in {teacher.folder}, "
            f"where {format_bytes(free)} are free; train.distill_top_k keeps less"
        )


def describe_pass(teacher: Teacher) -> str:
    """Describes in one line the files that a teacher pass writes."""
    plan = teacher.plan
    return (
        f"the dense model's outputs for {len(plan.samples)} samples: {format_bytes(plan.bytes)} in {teacher.folder}, "
        f"{len(teacher.to_write)} of {plan.files} files to write"
    )


def record_teacher(
    engine: TrainingEngine, teacher: Teacher, samples: Samples, batch_size: int, agree: Callable[[Communicator], int]
) -> bool:
    """Writes the files that were missing when the teacher was found, `world_size` at a time. Collective.

    Args:
        batch_size: samples of one forward pass.
        agree: returns the largest request of all ranks (stop.py).

    Returns:
        False if it was asked to stop before the end. The files written by then stay.
    """
    comm, missing, writes = engine.model.comm, teacher.to_write, LocalWrites(engine.model.comm, teacher.folder)
    comm.on_rank_0(teacher.begin)
    with adapters_off(engine.model.module):
        for first in range(0, len(missing), comm.world_size):
            files = missing[first : first + comm.world_size]  # file i on rank i
            # All ranks make the same forward passes, which gather the weights. One without a file repeats the first's.
            batches = [teacher.plan.members(file).split(batch_size) for file in files]
            own = batches[comm.rank] if comm.rank < len(files) else batches[0]
            fields = _file_content(engine, teacher, samples, own, passes=max(map(len, batches)))
            if comm.rank < len(files):
                writes.do(partial(teacher.write, files[comm.rank], fields))
            fail_point("teacher.file")
            writes.agree()
            is_last = first + comm.world_size >= len(missing)
            if not is_last and agree(comm) == STOP:
                return False
    comm.all_or_raise(lambda: _wait_for_files(teacher, comm))
    return True


def _file_content(
    engine: TrainingEngine, teacher: Teacher, samples: Samples, batches: Sequence[Tensor], *, passes: int
) -> dict[str, Tensor]:
    """Computes the fields of these samples for all their supervised tokens, in exactly `passes` forward passes."""
    parts = []
    for i in range(passes):
        indices = batches[i if i < len(batches) else 0]
        inputs = {name: tensor.to(engine.model.device) for name, tensor in samples.inputs(indices).items()}
        fields = engine.infer(**inputs, distillation=teacher.plan.recording)
        if i < len(batches):
            on_disk = {n: tensor.int() if tensor.dtype == torch.int64 else tensor for n, tensor in fields.items()}
            parts.append({name: tensor.cpu() for name, tensor in on_disk.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _wait_for_files(teacher: Teacher, comm: Communicator) -> None:
    """Waits for the files that this rank found missing. Its file system may remember that for a while."""
    for file in teacher.to_write:
        if file % comm.world_size == comm.rank and not wait_until_seen(partial(teacher.has, file)):
            raise UserError(f"{teacher.path(file)} was written by another rank and cannot be read by this one")
