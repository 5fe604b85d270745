"""Keeps the dense model's outputs for the samples of a run on disk, as the teacher for distillation.

<output_dir>/teacher/targets-00007.safetensors   the fields of a teacher (model/distillation.py) for the supervised
                                                 tokens of some samples, one sample after the other
                     teacher.json                the data, model and settings that the teacher was made from

All ranks write it once, before the first cut (teacher_pass.py). Files appear complete or not at all, so an interrupted
pass continues where it stopped. Nothing depends on the number of ranks.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.config import TrainConfig
from loraprune_ds.errors import RankError, one_line
from loraprune_ds.files import atomic_write, write_json
from loraprune_ds.model.distillation import (
    Distillation,
    HiddenTeacher,
    Recording,
    TopTeacher,
    samples_per_file,
    token_bytes,
)
from loraprune_ds.train.data.samples import BatchOrder, Samples

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

    def distillation(self, indices: Tensor, device: torch.device) -> Distillation:
        """Reads the teacher's outputs for the supervised tokens of these samples, in their order."""
        parts = [self._fields(sample) for sample in indices.tolist()]
        fields = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
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
