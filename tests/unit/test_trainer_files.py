"""Checkpoints that lack files of the Trainer, or hold other LoRA, go on from `pruning/`, or one line says why not."""

from pathlib import Path
from typing import Any

import pytest
from torch.optim import AdamW

from loraprune_ds.config import PruneConfig
from loraprune_ds.hf.callback import LoraPruneCallback
from loraprune_ds.hf.checkpoint import cut_to_checkpoint
from loraprune_ds.hf.pruning import Pruning
from loraprune_ds.hf.trainer_files import TrainerFiles
from loraprune_ds.ranks.comm import Communicator
from tests.oracle.models import make_tiny_llama
from tests.refusals import must_name, remove
from tests.unit.test_local import make_model

PRUNE = PruneConfig(ratio=0.3, channel_multiple=1)
ADAPTER = "adapter_model.safetensors"
ZERO: dict[str, Any] = {"zero_optimization": {"stage": 3}}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), heads=4, kv_heads=2, hidden=16, ffn=24, layers=2, vocab=32)


def save(dense: Path, out: Path, make: Any = AdamW) -> Path:
    """Writes a checkpoint as a Trainer does with save_only_model."""
    model = make_model(dense)
    checkpoint = out / "checkpoint-2"
    pruning = Pruning(model.train(), make(p for p in model.parameters() if p.requires_grad), PRUNE, 4)
    model.save_pretrained(checkpoint)
    touch(checkpoint, "trainer_state.json")
    pruning.save(checkpoint)
    return checkpoint


def resume(model: Any, folder: Path) -> LoraPruneCallback:
    callback = LoraPruneCallback(PRUNE)
    callback.resume(model, folder)
    return callback


@pytest.mark.parametrize(
    ("make", "missing", "r", "names"),
    [
        (AdamW, ADAPTER, 4, ADAPTER),
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


def test_on_zero_3_no_adapter_is_read_but_the_ranks_in_the_folder_of_pruning_count(dense: Path, tmp_path: Path) -> None:
    folder = save(dense, tmp_path)
    remove(ADAPTER)(folder)
    TrainerFiles(ZERO).check_readable(folder)
    model = make_model(dense, r=2)
    must_name("lora-00000.safetensors layers.0. 4 2", cut_to_checkpoint, model, folder, PRUNE, Communicator())
