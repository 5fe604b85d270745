"""A teacher's files hold the samples of the run, each is found again, and damaged files are named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.config import TrainConfig
from loraprune_ds.errors import RunError
from loraprune_ds.model.distillation import HiddenTeacher
from loraprune_ds.model.token_loss import IGNORE_INDEX
from loraprune_ds.train.data.order import SampleOrder
from loraprune_ds.train.data.samples import Samples, starts_of
from loraprune_ds.train.teacher import Teacher, make_teacher, plan_teacher

HIDDEN = 3
CPU = torch.device("cpu")


def ragged_samples(lengths: list[int], prompts: list[int]) -> Samples:
    starts = starts_of(torch.tensor(lengths))
    ids = torch.arange(1, int(starts[-1]) + 1, dtype=torch.int32)
    labels = ids.clone()
    for start, prompt in zip(starts.tolist(), prompts, strict=False):
        labels[start : start + prompt] = IGNORE_INDEX
    return Samples({"input_ids": ids, "labels": labels}, starts, max(lengths))


SAMPLES = ragged_samples([9, 4, 12, 2, 7], [3, 0, 11, 1, 7])


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 1, "global_batch_size": 2, "micro_batch_size": 1, "distill_weight": 0.5} | settings)


def made(folder: Path, steps: int = 10, **settings: Any) -> Teacher:
    plan = plan_teacher(config(**settings), SAMPLES, SampleOrder(5, 2, 0), steps, hidden_size=HIDDEN, element_size=4)
    return make_teacher(
        replace(plan, per_file=2), weight=0.5, samples="a", source="b", dtype="float32", seed=0, folder=folder
    )


def test_supervised_tokens_and_padding_of_ragged_samples() -> None:
    everything = torch.arange(5)
    labels = SAMPLES.inputs(everything)["labels"]
    assert SAMPLES.supervised_counts().tolist() == (labels[:, 1:] != IGNORE_INDEX).sum(1).tolist() == [6, 3, 1, 1, 0]
    attention_mask = SAMPLES.attention_mask(everything)
    assert attention_mask is not None
    assert torch.equal(attention_mask, SAMPLES.inputs(everything)["input_ids"] != 0)
    assert Samples.of_windows(labels).attention_mask(everything) is None


def test_only_samples_of_the_run_are_planned() -> None:
    order = SampleOrder(5, 2, 0)
    plan = plan_teacher(config(), SAMPLES, order, 1, hidden_size=HIDDEN, element_size=4)
    assert plan.samples.tolist() == sorted(order.batch(0).tolist())
    whole = plan_teacher(config(), SAMPLES, order, 10, hidden_size=HIDDEN, element_size=4)
    assert whole.samples.tolist() == [0, 1, 2, 3, 4]
    assert whole.bytes == 11 * HIDDEN * 4
    top = plan_teacher(config(distill_top_k=2), SAMPLES, order, 10, hidden_size=HIDDEN, element_size=4)
    assert top.bytes == 11 * (2 * (4 + 4) + 4)  # a log-probability and an id of each, and the rest


def test_every_sample_is_found_where_it_was_written(tmp_path: Path) -> None:
    teacher = made(tmp_path / "teacher")
    teacher.begin()
    rows = torch.arange(11 * HIDDEN, dtype=torch.float32).view(11, HIDDEN)
    assert teacher.missing() == [0, 1, 2]
    for file, (start, end) in enumerate([(0, 9), (9, 11), (11, 11)]):
        teacher.write(file, {"hidden": rows[start:end]})
    assert teacher.missing() == []
    found = teacher.distillation(torch.tensor([2, 0, 4, 1]), CPU).teacher
    assert isinstance(found, HiddenTeacher)
    assert torch.equal(found.hidden, torch.cat([rows[9:10], rows[0:6], rows[6:9]]))


def test_a_temperature_belongs_to_a_teacher(tmp_path: Path) -> None:
    plain, warm = made(tmp_path), made(tmp_path, distill_temperature=2)
    assert warm.identity == plain.identity | {"temperature": 2}
    warm.begin()
    warm.write(0, {"hidden": torch.zeros(9, HIDDEN)})
    assert warm.distillation(torch.tensor([0]), CPU).temperature == 2
    assert (warm.belongs(), plain.belongs()) == (True, False)


def test_a_damaged_file_is_missing_and_named(tmp_path: Path) -> None:
    teacher = made(tmp_path / "teacher")
    teacher.begin()
    teacher.write(0, {"hidden": torch.zeros(9, HIDDEN)})
    path = teacher.path(0)
    path.write_bytes(path.read_bytes()[:-1])
    assert teacher.missing() == [0, 1, 2]
    with pytest.raises(RunError, match=r"targets-00000\.safetensors cannot be read"):
        teacher.distillation(torch.tensor([0]), CPU)


def test_files_of_another_teacher_are_replaced(tmp_path: Path) -> None:
    teacher = made(tmp_path / "teacher")
    teacher.begin()
    teacher.write(0, {"hidden": torch.zeros(9, HIDDEN)})
    same = made(tmp_path / "teacher")
    same.begin()
    assert same.missing() == [1, 2]
    assert [same.missing(rank, 2) for rank in range(2)] == [[2], [1]]  # as two ranks look for them
    other = replace(teacher, identity=teacher.identity | {"source": "c"})
    assert not other.belongs()
    other.begin()
    assert other.belongs()
    assert other.missing() == [0, 1, 2]
