"""Keeps the dense model's outputs for the samples of a run on disk, as the teacher for distillation.

<output_dir>/teacher/targets-00007.safetensors   the fields of a teacher (model/distillation.py) for the supervised
                                                 tokens of some samples, one sample after the other
                     teacher.json                what the teacher was made from

All ranks write it once, before the first cut (teacher_pass.py). A file appears whole or not at all, so an interrupted
pass goes on where it was. Nothing depends on the number of ranks.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.config import TrainConfig
from loraprune_ds.errors import RankError, one_line
from loraprune_ds.files import write_json
from loraprune_ds.model.distillation import (
    Distillation,
    HiddenTeacher,
    Recording,
    TopTeacher,
    samples_per_file,
    token_bytes,
)
from loraprune_ds.train.data.order import BatchOrder
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.whole import whole_file

IDENTITY_FILE = "teacher.json"


@dataclass(frozen=True)
class TeacherPlan:
    """Describes what a teacher pass will write.

    Attributes:
        samples: (needed,) int64 numbers of the samples that the run uses, ascending.
        offsets: (needed + 1,) int64; sample i has the supervised tokens offsets[i] … offsets[i + 1].
        recording: what of a token is kept.
        token_bytes: on disk, of one supervised token.
        per_file: samples in a file.
    """

    samples: Tensor
    offsets: Tensor
    recording: Recording
    token_bytes: int
    per_file: int

    @property
    def files(self) -> int:
        return -(-len(self.samples) // self.per_file)

    @property
    def bytes(self) -> int:
        """The size of all files together on disk, without their headers."""
        return int(self.offsets[-1]) * self.token_bytes

    def members(self, file: int) -> Tensor:
        """Returns the numbers of the samples in a file."""
        return self.samples[file * self.per_file : (file + 1) * self.per_file]

    def place(self, sample: int) -> tuple[int, int, int]:
        """Returns where a sample lies: its file, its first row there, and its number of rows."""
        i = int(torch.searchsorted(self.samples, sample))
        file = i // self.per_file
        first = int(self.offsets[i] - self.offsets[file * self.per_file])
        return file, first, int(self.offsets[i + 1] - self.offsets[i])


def plan_teacher(
    config: TrainConfig, samples: Samples, order: BatchOrder, steps: int, *, hidden_size: int, element_size: int
) -> TeacherPlan:
    """Plans the teacher pass of a run of `steps` steps.

    Args:
        hidden_size: of the model.
        element_size: bytes of a number in the model's dtype.
    """
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
    """Reads and writes the files of one run's teacher.

    Attributes:
        weight: w of the loss.
        identity: what the files were made from, as teacher.json has it.
        to_write: numbers of the files that were missing when the teacher was found.
    """

    folder: Path
    plan: TeacherPlan
    weight: float
    identity: dict[str, Any]
    to_write: Sequence[int] = ()

    def path(self, file: int) -> Path:
        return self.folder / f"targets-{file:05d}.safetensors"

    def begin(self) -> None:
        """Makes the folder and removes files of another teacher. On rank 0 only."""
        if not self.belongs():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(self.folder / IDENTITY_FILE, self.identity)

    def belongs(self) -> bool:
        """Tells if the folder holds files of this very teacher, all or some."""
        try:
            return json.loads((self.folder / IDENTITY_FILE).read_text()) == self.identity
        except (OSError, ValueError):
            return False

    def missing(self, part: int = 0, parts: int = 1) -> list[int]:
        """Finds the files that are not there or not whole.

        Looks only at every `parts`-th file, from `part` on, so that ranks can share the work.
        """
        belongs = self.belongs()
        return [file for file in range(part, self.plan.files, parts) if not (belongs and self.has(file))]

    def has(self, file: int) -> bool:
        """Tells if a file is there and whole."""
        return _is_whole(self.path(file))

    def write(self, file: int, fields: dict[str, Tensor]) -> None:
        """Writes a file. It appears whole, and its content lasts when the machine dies."""
        with whole_file(self.path(file), lasting=True) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in fields.items()}, temporary)

    def distillation(self, indices: Tensor, device: torch.device) -> Distillation:
        """Reads what the loss needs for the supervised tokens of these samples, in their order.

        Raises:
            RankError: a file is missing or damaged.
        """
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


def make_teacher(
    plan: TeacherPlan, *, weight: float, samples: str, source: str, dtype: str, seed: int, folder: Path
) -> Teacher:
    """Describes the teacher of a run whose files are, or will be, in `folder`.

    Args:
        weight: `train.distill_weight`.
        samples, source: digests of the tuning samples and of the dense model.
        dtype: of the dense model, as `held_as` says it.
        seed: of the run, which decides which samples it uses.
    """
    identity = {
        "samples": samples,
        "source": source,
        "dtype": dtype,
        "top_k": plan.recording.top_k,
        "seed": seed,
        "needed": len(plan.samples),
        "tokens": int(plan.offsets[-1]),
        "per_file": plan.per_file,
        "temperature": plan.recording.temperature,
    }
    return Teacher(folder, plan, weight, identity)


def _is_whole(path: Path) -> bool:
    """Tells if the length of a safetensors file fits its header. If not, opening it fails."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
