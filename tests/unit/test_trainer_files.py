"""Checkpoints that lack files of the Trainer, or hold other LoRA, go on from `pruning/`, or one line says why not."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from torch.optim import SGD, AdamW

from loraprune_ds.config import PruneConfig
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.hf.trainer_files import check_complete, lost
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.zero.live import LiveZero3
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import make_model
from tests.support.refusals import must_name, remove

PRUNE = PruneConfig(ratio=0.3, channel_multiple=1)
ADAPTER = "adapter_model.safetensors"


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("ranks", "names", "missing"),
    [
        (1, (), "rng_state.pth"),
        (2, ("rng_state_0.pth",), "rng_state_1.pth"),
        (1, ("rng_state.pth",), None),
    ],
)
def test_random_numbers_that_cannot_come_back_are_named(
    tmp_path: Path, ranks: int, names: tuple[str, ...], missing: str | None
) -> None:
    touch(tmp_path, *names)
    assert lost(tmp_path, ranks) == (missing and tmp_path / missing)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), hidden=16, ffn=24, vocab=32)


def save(dense: Path, out: Path, make: Any = AdamW) -> Path:
    """Writes a checkpoint as a Trainer does with save_only_model."""
    model = make_model(dense)
    checkpoint = out / "checkpoint-2"
    pruning = Pruning(
        model.train(), make(p for p in model.parameters() if p.requires_grad), PRUNE, 4
    )
    model.save_pretrained(checkpoint)
    touch(checkpoint, "trainer_state.json")
    pruning.save(checkpoint)
    return checkpoint


def resume(model: Any, folder: Path) -> LoraPruneCallback:
    callback = LoraPruneCallback(PRUNE)
    callback.resume(model, folder)
    return callback


def test_a_checkpoint_says_once_what_is_lost(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(dense, tmp_path)
    resume(make_model(dense), folder)
    (warning,) = (record.getMessage() for record in caplog.records)
    assert str(folder / "rng_state.pth") in warning
    touch(folder, "rng_state.pth")
    caplog.clear()
    resume(make_model(dense), folder)
    assert not caplog.records


@pytest.mark.parametrize(
    ("make", "missing", "r", "names"),
    [
        (AdamW, "trainer_state.json", 4, "trainer_state.json"),
        (AdamW, None, 2, "lora-00000.safetensors layers.0. _proj 4 2"),
    ],
)
def test_a_checkpoint_that_cannot_go_on_is_one_line(
    dense: Path, tmp_path: Path, make: Any, missing: str | None, r: int, names: str
) -> None:
    folder = save(dense, tmp_path, make)
    if missing is not None:
        remove(missing)(folder)
    must_name(f"{folder} {names}", resume, make_model(dense, r), folder)


def test_deepspeed_in_fp16_needs_the_loss_scale_of_deepspeed(dense: Path, tmp_path: Path) -> None:
    folder = save(dense, tmp_path)
    model = make_model(dense)
    checkpoint = resume(model, folder)._checkpoint
    on_zero_3 = replace(cast(Any, checkpoint), engine=LiveZero3())
    must_name(f"{folder} local fp16", check_complete, on_zero_3, model.half())


@pytest.mark.parametrize(
    ("make", "whole", "names"), [(SGD, (), "Adam SGD"), (AdamW, ("lm_head",), "[] lm_head.weight")]
)
def test_another_optimizer_and_other_tensors_that_train_are_named(
    dense: Path, tmp_path: Path, make: Any, whole: tuple[str, ...], names: str
) -> None:
    folder = save(dense, tmp_path)
    model = make_model(dense, whole=whole)
    checkpoint = resume(model, folder)._checkpoint
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    must_name(names, Pruning, model.train(), optimizer, PRUNE, 4, checkpoint=checkpoint)
