"""Checkpoints that lack files of the Trainer, or hold other LoRA, go on from `pruning/`, or one line says why not."""

from pathlib import Path
from typing import Any, cast

import pytest
from torch.optim import SGD, AdamW

from loraprune_ds.config import PruneConfig
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.hf.trainer_files import TrainerFiles
from loraprune_ds.local.live import LiveLocal
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session.checkpoint import cut_to_checkpoint
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.zero.live import LiveZero3
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import make_model
from tests.support.refusals import must_name, remove

PRUNE = PruneConfig(ratio=0.3, channel_multiple=1)
ADAPTER, OPTIMIZER, SCHEDULE = "adapter_model.safetensors", "optimizer.pt", "scheduler.pt"
TAG, OWN = "global_step2", "zero_pp_rank_1_mp_rank_00"
OF_RANK_1 = [f"{TAG}/{OWN}_model_states.pt", f"{TAG}/bf16_{OWN}_optim_states.pt"]
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 3}}
LACKS_ZERO = ["complete global_step*"]


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("config", "names", "lacking"),
    [
        (None, [ADAPTER, OPTIMIZER, SCHEDULE], []),
        (None, [ADAPTER, OPTIMIZER], [SCHEDULE]),
        (None, [ADAPTER, SCHEDULE], [OPTIMIZER]),
        (None, [OPTIMIZER, SCHEDULE], [ADAPTER]),
        (ZERO, [SCHEDULE, "latest", *OF_RANK_1], []),
        (ZERO, ["latest", *OF_RANK_1], [SCHEDULE]),
        # DeepSpeed's files have the schedule, too
        (ZERO | {"optimizer": {}}, ["latest", *OF_RANK_1], []),
        (ZERO, [SCHEDULE, "latest", *OF_RANK_1[:1]], LACKS_ZERO),
        (ZERO, [SCHEDULE, *OF_RANK_1], LACKS_ZERO),
        (ZERO, [OPTIMIZER], [*LACKS_ZERO, SCHEDULE]),
    ],
)
def test_files_without_which_no_optimizer_is_loaded_are_named(
    tmp_path: Path, config: dict[str, Any] | None, names: list[str], lacking: list[str]
) -> None:
    touch(tmp_path, *names)
    if "latest" in names:
        (tmp_path / "latest").write_text(TAG)
    touch(tmp_path, "trainer_state.json")
    engine = LiveZero3() if config else LiveLocal()
    assert TrainerFiles(config).lacking(tmp_path, 1, engine) == lacking


@pytest.mark.parametrize(
    ("files", "ranks", "names", "lost"),
    [
        (TrainerFiles(), 1, (), ["rng_state.pth"]),
        (TrainerFiles(fp16=True), 2, ("rng_state_0.pth",), ["rng_state_1.pth", "scaler.pt"]),
        (TrainerFiles(ZERO, fp16=True), 1, ("rng_state.pth",), []),
        (TrainerFiles(fp16=True), 1, ("rng_state.pth", "scaler.pt"), []),
    ],
)
def test_what_cannot_come_back_is_named(
    tmp_path: Path, files: TrainerFiles, ranks: int, names: tuple[str, ...], lost: list[str]
) -> None:
    touch(tmp_path, *names)
    for name, line in zip(lost, files.lost(tmp_path, ranks), strict=True):
        assert name in line


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


def test_a_checkpoint_without_an_optimizer_is_restored_and_says_what_is_lost(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(dense, tmp_path)
    assert cast(Any, resume(make_model(dense), folder)._checkpoint).restores_optimizer
    (warning,) = (record.getMessage() for record in caplog.records)
    assert all(name in warning for name in (str(folder), "rng_state.pth"))
    touch(folder, OPTIMIZER, SCHEDULE, "rng_state.pth")
    caplog.clear()
    assert not cast(Any, resume(make_model(dense), folder)._checkpoint).restores_optimizer
    assert not caplog.records


@pytest.mark.parametrize(
    ("make", "missing", "r", "names"),
    [
        (AdamW, "trainer_state.json", 4, "trainer_state.json"),
        (AdamW, None, 2, f"{ADAPTER} layers.0. _proj 4 2"),
    ],
)
def test_a_checkpoint_that_cannot_go_on_is_one_line(
    dense: Path, tmp_path: Path, make: Any, missing: str | None, r: int, names: str
) -> None:
    folder = save(dense, tmp_path, make)
    if missing is not None:
        remove(missing)(folder)
    must_name(f"{folder} {names}", resume, make_model(dense, r), folder)


def test_on_zero_3_no_adapter_is_read_but_the_ranks_in_the_folder_of_pruning_count(
    dense: Path, tmp_path: Path
) -> None:
    folder = save(dense, tmp_path)
    remove(ADAPTER)(folder)
    assert TrainerFiles(ZERO).lacking(folder, 0, LiveZero3()) == ["complete global_step*", SCHEDULE]
    model = make_model(dense, r=2)
    must_name(
        "lora-00000.safetensors layers.0. 4 2",
        cut_to_checkpoint,
        model,
        folder,
        PRUNE,
        Communicator(),
    )


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
