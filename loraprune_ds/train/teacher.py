"""Keeps the dense model's outputs for the samples of a run on disk, as the teacher for distillation.

<output_dir>/teacher/targets-00007.safetensors   the fields of a teacher (model/logits.py) for the supervised
                                                 tokens of some samples, one sample after the other
                     teacher.json                the data, model and settings that the teacher was made from

All ranks write it once, before the first cut. Files appear complete or not at all, so an interrupted
pass continues where it stopped. Nothing depends on the number of ranks.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.checkpoint.layout import TEACHER_FOLDER
from loraprune_ds.checkpoint.load import source_digest
from loraprune_ds.config import TrainConfig
from loraprune_ds.errors import RankError, UserError, fail_point, one_line
from loraprune_ds.files import atomic_write, write_json
from loraprune_ds.model.adapters import adapters_off
from loraprune_ds.model.frozen import DTYPES, describe_dtype
from loraprune_ds.model.logits import (
    Distillation,
    HiddenTeacher,
    Recording,
    TopTeacher,
    samples_per_file,
    token_bytes,
)
from loraprune_ds.train.context import RunContext
from loraprune_ds.train.data.samples import BatchOrder, Samples
from loraprune_ds.train.output import wait_until_seen
from loraprune_ds.train.stop import STOP
from loraprune_ds.units import format_bytes
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.training_engine import TrainingEngine
from loraprune_ds.zero.write import LocalWrites

IDENTITY_FILE = "teacher.json"


@dataclass(frozen=True)
class TeacherPlan:
    """Describes the files of a teacher pass."""

    samples: Tensor  # (needed,) int64 numbers of the samples that the run uses, ascending
    offsets: Tensor  # (needed + 1,) int64; sample i has the supervised tokens offsets[i] … offsets[i + 1]
    recording: Recording
    token_bytes: int  # on disk, of one supervised token
    per_file: int  # samples

    @property
    def files(self) -> int:
        return -(-len(self.samples) // self.per_file)

    @property
    def bytes(self) -> int:
        """On disk, of all files, without their headers."""
        return int(self.offsets[-1]) * self.token_bytes

    def members(self, file: int) -> Tensor:
        """Returns the numbers of a file's samples."""
        return self.samples[file * self.per_file : (file + 1) * self.per_file]

    def place(self, sample: int) -> tuple[int, int, int]:
        """Returns a sample's file, its first row there, and its number of rows."""
        i = int(torch.searchsorted(self.samples, sample))
        file = i // self.per_file
        first = int(self.offsets[i] - self.offsets[file * self.per_file])
        return file, first, int(self.offsets[i + 1] - self.offsets[i])


def plan_teacher(
    config: TrainConfig, samples: Samples, order: BatchOrder, steps: int, hidden_size: int, element_size: int
) -> TeacherPlan:
    """Plans the teacher pass of a run of `steps` steps. A number of its hidden states has `element_size` bytes."""
    if steps * config.global_batch_size >= len(samples):
        needed = torch.arange(len(samples))
    else:
        needed = torch.from_numpy(np.unique(np.concatenate([order.batch(s).numpy() for s in range(steps)])))
    counts = samples.supervised_counts()[needed]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    size = token_bytes(config.distill_top_k, hidden_size, element_size)
    recording = Recording(config.distill_top_k, config.distill_temperature)
    return TeacherPlan(needed, offsets, recording, size, samples_per_file(size * int(counts.max())))


@dataclass(frozen=True)
class Teacher:
    """Reads and writes the files of one run's teacher."""

    folder: Path
    plan: TeacherPlan
    weight: float  # of the distillation in the loss
    # Digests of the tuning samples and the dense model, its dtype, and the seed, which decides the samples of a step.
    origin: dict[str, object]
    to_write: Sequence[int] = ()  # files that were missing when the teacher was found

    @property
    def identity(self) -> dict[str, object]:
        """The content of teacher.json."""
        plan = self.plan
        return self.origin | {
            "top_k": plan.recording.top_k,
            "needed": len(plan.samples),
            "tokens": int(plan.offsets[-1]),
            "per_file": plan.per_file,
            "temperature": plan.recording.temperature,
        }

    def path(self, file: int) -> Path:
        return self.folder / f"targets-{file:05d}.safetensors"

    def begin(self) -> None:
        """Makes the folder and removes another teacher's files. On rank 0 only."""
        if not self.belongs():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(self.folder / IDENTITY_FILE, self.identity)

    def belongs(self) -> bool:
        """Whether the files in the folder are this teacher's."""
        try:
            return json.loads((self.folder / IDENTITY_FILE).read_text()) == self.identity
        except (OSError, ValueError):
            return False

    def missing(self, part: int = 0, parts: int = 1) -> list[int]:
        """Finds missing or damaged files among every `parts`-th file from `part` on, so ranks can share the work."""
        belongs = self.belongs()
        return [file for file in range(part, self.plan.files, parts) if not (belongs and self.has(file))]

    def has(self, file: int) -> bool:
        """Whether a file is there and its length fits its header. Otherwise opening it fails."""
        try:
            with safe_open(self.path(file), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def write(self, file: int, fields: dict[str, Tensor]) -> None:
        with atomic_write(self.path(file), lasting=True) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in fields.items()}, temporary)

    def distillation(self, indices: Tensor, inputs: dict[str, Any]) -> Distillation:
        """Reads the teacher's outputs for the supervised tokens of these samples, to the device of their inputs."""
        parts = [self._fields(sample) for sample in indices.tolist()]
        fields = {name: torch.cat([part[name] for part in parts]).to(inputs["labels"].device) for name in parts[0]}
        if "hidden" in fields:
            teacher = HiddenTeacher(fields["hidden"])
        else:
            teacher = TopTeacher(fields["log_probs"], fields["ids"].long(), fields["rest"])
        return Distillation(teacher, self.weight, self.plan.recording.temperature)

    def _fields(self, sample: int) -> dict[str, Tensor]:
        file, first, rows = self.plan.place(sample)
        try:
            with safe_open(self.path(file), framework="pt") as opened:
                return {name: opened.get_slice(name)[first : first + rows] for name in opened.keys()}
        except (OSError, SafetensorError) as error:
            raise RankError(f"{self.path(file)} cannot be read: {one_line(error)}") from None


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
        raise UserError(
            f"{lost} is missing or damaged, and the model that would write it again is cut already; train.teacher: "
            "live goes on without it"
        )
    needed = teacher.plan.bytes * len(teacher.to_write) // teacher.plan.files
    free = shutil.disk_usage(context.folder).free
    if needed > free:
        raise UserError(
            f"train.distill_weight: the outputs of the dense model need {format_bytes(needed)} in {teacher.folder}, "
            f"where {format_bytes(free)} are free; train.distill_top_k keeps less, train.teacher: live nothing"
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
