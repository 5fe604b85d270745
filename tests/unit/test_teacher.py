"""A teacher's files hold the samples of the run, each is found again, and damaged files are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.config import TrainConfig
from loraprune_ds.errors import RunError
from loraprune_ds.model.logits import HiddenTeacher
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.train.data.samples import SampleOrder, Samples, starts_of
from loraprune_ds.train.teacher import Teacher, TeacherPlan, plan_teacher

HIDDEN = 3
INPUTS = {"labels": torch.zeros(1)}  # on the device of the loss


def ragged_samples(lengths: list[int], prompts: list[int]) -> Samples:
    starts = starts_of(torch.tensor(lengths))
    ids = torch.arange(1, int(starts[-1]) + 1, dtype=torch.int32)
    labels = ids.clone()
    for start, prompt in zip(starts.tolist(), prompts, strict=False):
        labels[start : start + prompt] = IGNORE_INDEX
    return Samples({"input_ids": ids, "labels": labels}, starts, max(lengths))


SAMPLES, ORDER = ragged_samples([9, 4, 12, 2, 7], [3, 0, 11, 1, 7]), SampleOrder(5, 2, 0)


def planned(steps: int = 10, **settings: Any) -> TeacherPlan:
    config = TrainConfig(
        **{"steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "distill_weight": 0.5} | settings
    )
    return plan_teacher(config, SAMPLES, ORDER, steps, HIDDEN, 4)


def made(folder: Path, **settings: Any) -> Teacher:
    plan = replace(planned(**settings), per_file=2)
    return Teacher(folder, plan, 0.5, {"samples": "a", "source": "b", "dtype": "float32", "seed": 0})


@pytest.fixture
def teacher(tmp_path: Path) -> Teacher:
    """A teacher with the first of three files."""
    teacher = made(tmp_path / "teacher")
    teacher.begin()
    teacher.write(0, {"hidden": torch.arange(9.0 * HIDDEN).view(9, HIDDEN)})
    return teacher


def test_supervised_tokens_and_padding_of_ragged_samples() -> None:
    everything = torch.arange(5)
    labels = SAMPLES.inputs(everything)["labels"]
    assert SAMPLES.supervised_counts().tolist() == (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist() == [6, 3, 1, 1, 0]
    attention_mask = SAMPLES.attention_mask(everything)
    assert attention_mask is not None
    assert torch.equal(attention_mask, SAMPLES.inputs(everything)["input_ids"] != 0)
    assert Samples.of_windows(labels).attention_mask(everything) is None


def test_only_samples_of_the_run_are_planned() -> None:
    assert planned(steps=1).samples.tolist() == sorted(ORDER.batch(0).tolist())
    assert planned().samples.tolist() == [0, 1, 2, 3, 4]
    assert planned().bytes == 11 * HIDDEN * 4
    assert planned(distill_top_k=2).bytes == 11 * (2 * (4 + 4) + 4)  # a log-probability and an id each, and the rest


def test_every_sample_is_found_where_it_was_written(teacher: Teacher) -> None:
    assert teacher.missing() == [1, 2]
    assert [teacher.missing(rank, 2) for rank in range(2)] == [[2], [1]]  # as two ranks look for them
    teacher.write(1, {"hidden": torch.tensor([[-1.0] * HIDDEN, [-2.0] * HIDDEN])})
    teacher.write(2, {"hidden": torch.zeros(0, HIDDEN)})
    assert teacher.missing() == []
    found = teacher.distillation(torch.tensor([3, 0, 4, 1]), INPUTS).teacher
    rows = torch.arange(9.0 * HIDDEN).view(9, HIDDEN)
    assert isinstance(found, HiddenTeacher)
    assert torch.equal(found.hidden, torch.cat([torch.full((1, HIDDEN), -2.0), rows]))


def test_a_damaged_file_is_missing_and_named(teacher: Teacher) -> None:
    path = teacher.path(0)
    path.write_bytes(path.read_bytes()[:-1])
    assert teacher.missing() == [0, 1, 2]
    with pytest.raises(RunError, match=r"targets-00000\.safetensors cannot be read"):
        teacher.distillation(torch.tensor([0]), INPUTS)


def test_files_of_another_teacher_are_replaced(teacher: Teacher) -> None:
    made(teacher.folder).begin()  # the same one
    assert teacher.missing() == [1, 2]
    warm = made(teacher.folder, distill_temperature=2)
    assert warm.identity == teacher.identity | {"temperature": 2}
    assert not warm.belongs()
    warm.begin()
    assert (warm.belongs(), teacher.belongs(), warm.missing()) == (True, False, [0, 1, 2])
    warm.write(0, {"hidden": torch.zeros(9, HIDDEN)})
    assert warm.distillation(torch.tensor([0]), INPUTS).temperature == 2
