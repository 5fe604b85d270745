"""What the uncut model predicts for the samples of a run, on disk: written once by all ranks before the first cut.

<output_dir>/teacher/targets-00007.safetensors   the fields of a teacher (model/distillation.py) for the supervised
                                                 tokens of some samples, one sample after the other
                     teacher.json                whose they are, and how many samples a file has
A file appears whole or not at all, so an interrupted pass goes on where it was. Nothing depends on the number of ranks.
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

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import RankError, one_line
from loraprune_ds.files import write_json
from loraprune_ds.model.distillation import Distillation, HiddenTeacher, TopTeacher, samples_per_file, token_bytes
from loraprune_ds.train.data.order import SampleOrder
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.whole import whole_file

MANIFEST = "teacher.json"


@dataclass(frozen=True)
class TeacherPlan:
    """What a teacher pass will write.

    Attributes:
        samples: (needed,) int64 numbers of the samples that the run uses, ascending.
        offsets: (needed + 1,) int64; sample i has the supervised tokens offsets[i] … offsets[i + 1].
        token_bytes: on disk, of one supervised token.
        per_file: samples in a file.
    """

    samples: Tensor
    offsets: Tensor
    token_bytes: int
    per_file: int

    @property
    def files(self) -> int:
        return -(-len(self.samples) // self.per_file)

    @property
    def bytes(self) -> int:
        """On disk, all files together, their headers left out."""
        return int(self.offsets[-1]) * self.token_bytes

    def members(self, file: int) -> Tensor:
        """Numbers of the samples in a file."""
        return self.samples[file * self.per_file : (file + 1) * self.per_file]

    def place(self, sample: int) -> tuple[int, int, int]:
        """(file, first row in it, rows) of a sample."""
        i = int(torch.searchsorted(self.samples, sample))
        file = i // self.per_file
        first = int(self.offsets[i] - self.offsets[file * self.per_file])
        return file, first, int(self.offsets[i + 1] - self.offsets[i])


def plan_teacher(
    config: RunConfig, samples: Samples, order: SampleOrder, steps: int, *, hidden_size: int, element_size: int
) -> TeacherPlan:
    """What the teacher pass of a run of `steps` steps will write; `element_size` is that of the model's dtype."""
    used = steps * config.train.global_batch_size
    if used >= len(samples):
        needed = torch.arange(len(samples))
    else:
        needed = torch.from_numpy(np.unique(np.concatenate([order.batch(s).numpy() for s in range(steps)])))
    counts = samples.supervised_counts()[needed]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    size = token_bytes(config.train.distill_top_k, hidden_size, element_size)
    return TeacherPlan(needed, offsets, size, per_file=samples_per_file(size * int(counts.max())))


@dataclass(frozen=True)
class Teacher:
    """The files of one run.

    Attributes:
        identity: what they were made from, as teacher.json has it.
        to_write: those that were missing when the teacher was found.
    """

    folder: Path
    plan: TeacherPlan
    weight: float
    identity: dict[str, Any]
    to_write: Sequence[int] = ()

    def path(self, file: int) -> Path:
        return self.folder / f"targets-{file:05d}.safetensors"

    def begin(self) -> None:
        """Makes the folder; files of another teacher are removed. On rank 0 only."""
        if not self.belongs():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(self.folder / MANIFEST, self.identity)

    def belongs(self) -> bool:
        """Whether the folder holds files of this very teacher, all or some."""
        try:
            return json.loads((self.folder / MANIFEST).read_text()) == self.identity
        except (OSError, ValueError):
            return False

    def missing(self, part: int = 0, parts: int = 1) -> list[int]:
        """Of every `parts`-th file those that are not there or not whole, so that ranks can share the looking."""
        belongs = self.belongs()
        return [file for file in range(part, self.plan.files, parts) if not (belongs and self.has(file))]

    def has(self, file: int) -> bool:
        """Whether a file is there and whole."""
        return _is_whole(self.path(file))

    def write(self, file: int, fields: dict[str, Tensor]) -> None:
        """Publishes a file."""
        with whole_file(self.path(file), lasting=True) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in fields.items()}, temporary)

    def distillation(self, indices: Tensor, device: torch.device) -> Distillation:
        """For the supervised tokens of these samples, in their order.

        Raises:
            RankError: a file is missing or damaged.
        """
        parts = [self._fields(sample) for sample in indices.tolist()]
        fields = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
        if "hidden" in fields:
            return Distillation(HiddenTeacher(fields["hidden"]), self.weight)
        return Distillation(TopTeacher(fields["log_probs"], fields["ids"].long(), fields["rest"]), self.weight)

    def _fields(self, sample: int) -> dict[str, Tensor]:
        file, first, rows = self.plan.place(sample)
        try:
            with safe_open(self.path(file), framework="pt") as opened:
                return {name: opened.get_slice(name)[first : first + rows] for name in opened.keys()}
        except (OSError, SafetensorError) as error:
            raise RankError(f"{self.path(file)} cannot be read: {one_line(error)}") from None


def make_teacher(config: RunConfig, plan: TeacherPlan, *, samples: str, source: str, folder: Path) -> Teacher:
    """The teacher of a run whose files are, or will be, in `folder`.

    Args:
        samples, source: digests of the tuning samples and of the uncut model.
    """
    identity = {
        "samples": samples,
        "source": source,
        "dtype": config.model.dtype,
        "top_k": config.train.distill_top_k,
        "seed": config.seed,
        "needed": len(plan.samples),
        "tokens": int(plan.offsets[-1]),
        "per_file": plan.per_file,
    }
    return Teacher(folder, plan, config.train.distill_weight, identity)


def _is_whole(path: Path) -> bool:
    """The length of a safetensors file fits its header, or opening it fails."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
