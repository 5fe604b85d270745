"""The one forward pass of the uncut model over the samples of a run that a distillation needs, on all ranks."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loraprune_ds.checkpoint.load import Saved, source_digest
from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.faults import fail_point
from loraprune_ds.model.adapters import adapters_off
from loraprune_ds.model.distillation import Recording
from loraprune_ds.train.data import Samples
from loraprune_ds.train.output import comes_to_be_seen
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.stop import STOP
from loraprune_ds.train.teacher import TEACHER_FOLDER, Teacher, make_teacher, plan_teacher
from loraprune_ds.units import format_bytes
from loraprune_ds.zero.device import DTYPES
from loraprune_ds.zero.sharded import ShardedStore
from loraprune_ds.zero.write import LocalWrites


def find_teacher(config: RunConfig, prepared: Prepared, saved: Saved | None) -> Teacher:
    """The teacher of a run: in its own folder, or in that of the run it goes on from. Every rank finds the same.

    Raises:
        UserError: its files are not all there though the model is cut already, or will not fit on the disk.
    """
    shape = prepared.checkpoint.shape
    plan = plan_teacher(
        config,
        prepared.samples,
        prepared.order,
        prepared.steps,
        hidden_size=shape.hidden_size,
        element_size=DTYPES[config.model.dtype].itemsize,
    )
    folders = [Path(config.output_dir) / TEACHER_FOLDER]
    if saved is not None:
        folders.append(saved.folder.parents[1] / TEACHER_FOLDER)
    samples, source = prepared.samples.digest(), source_digest(prepared.checkpoint)
    teachers = [make_teacher(config, plan, samples=samples, source=source, folder=folder) for folder in folders]
    if complete := next((t for t in teachers if t.belongs() and not t.missing()), None):
        return complete
    teacher = teachers[0]
    missing = teacher.missing() if teacher.belongs() else list(range(plan.files))
    if saved is not None and saved.state.cuts:
        raise UserError(
            f"{teacher.path(missing[0])} is missing or damaged, and the model that would write it again is cut already"
        )
    needed, free = plan.bytes * len(missing) // plan.files, shutil.disk_usage(config.output_dir).free
    if needed > free:
        raise UserError(
            f"train.distill_weight: the outputs of the uncut model need {format_bytes(needed)} in {teacher.folder}, "
            f"where {format_bytes(free)} are free; train.distill_top_k keeps less"
        )
    return teacher


def record_teacher(
    store: ShardedStore,
    teacher: Teacher,
    samples: Samples,
    config: RunConfig,
    *,
    pending: Callable[[], int],
    note: Callable[[str], None],
) -> bool:
    """Writes what is missing, each file by one rank, W files at a time. Collective.

    Returns:
        False if it was asked to stop before the end; what is written stays.

    Raises:
        RunError: a rank cannot write.
    """
    comm = store.comm
    comm.together(lambda: teacher.begin() if comm.rank == 0 else None)
    missing = comm.gather_objects(teacher.missing())[0]
    if not missing:
        return True
    plan = teacher.plan
    note(
        f"the uncut model's outputs for {len(plan.samples)} samples: {format_bytes(plan.bytes)} in {teacher.folder}, "
        f"{len(missing)} of {plan.files} files to write"
    )
    with adapters_off(store.module):
        if not _write_files(store, teacher, samples, config, missing, pending):
            return False
    comm.together(lambda: _wait_for_files(teacher))
    return True


def _write_files(
    store: ShardedStore,
    teacher: Teacher,
    samples: Samples,
    config: RunConfig,
    missing: list[int],
    pending: Callable[[], int],
) -> bool:
    comm, writes = store.comm, LocalWrites()
    for first in range(0, len(missing), comm.world_size):
        files = missing[first : first + comm.world_size]
        passes = max(-(-len(teacher.plan.members(file)) // config.train.micro_batch_size) for file in files)
        is_mine = comm.rank < len(files)
        file = files[comm.rank if is_mine else 0]  # out of files: as many forward passes, written nowhere
        fields = _file_content(store, teacher, samples, config, file, passes)
        if is_mine:
            writes.do(lambda file=file, fields=fields: teacher.write(file, fields))
        fail_point("teacher.file")
        writes.agree(comm, teacher.folder)
        if max(comm.gather_objects(pending())) == STOP and first + comm.world_size < len(missing):
            return False
    return True


def _file_content(
    store: ShardedStore, teacher: Teacher, samples: Samples, config: RunConfig, file: int, passes: int
) -> dict[str, Tensor]:
    """All supervised tokens of a file, in so many forward passes, of which every rank makes the same number."""
    batches = teacher.plan.members(file).split(config.train.micro_batch_size)
    parts = []
    for i in range(passes):
        indices = batches[i if i < len(batches) else 0]
        input_ids, labels = (t[indices].long().to(store.device) for t in (samples.input_ids, samples.labels))
        recording = Recording(config.train.distill_top_k)
        fields = store.infer(input_ids=input_ids, labels=labels, distillation=recording)
        if i < len(batches):
            parts.append({name: _on_disk(tensor) for name, tensor in fields.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _wait_for_files(teacher: Teacher) -> None:
    """Until this rank sees what the others wrote."""
    for file in teacher.missing():
        if not comes_to_be_seen(partial(teacher.has, file)):
            raise UserError(f"{teacher.path(file)} was written by another rank and cannot be read by this one")


def _on_disk(tensor: Tensor) -> Tensor:
    return (tensor.int() if tensor.dtype == torch.int64 else tensor).cpu()
