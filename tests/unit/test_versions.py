"""What runs, ZeRO-3, families and pictures need of other packages is refused by name, and missing nowhere else."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.optim import SGD
from transformers import TrainerState

from loraprune_ds import LoraPruneCallback, PruneConfig, Pruning, versions
from loraprune_ds.cli import run
from loraprune_ds.export.contents import FolderContents
from loraprune_ds.export.formats import export
from loraprune_ds.hf import callback
from loraprune_ds.model import family
from loraprune_ds.pretrained.weight_files import check_room
from tests.oracle.models import make_tiny_llama
from tests.support.launching import ROOT
from tests.support.local_training import PRUNE, STEPS, make_model
from tests.support.refusals import must_name

GB = 10**9
LAUNCH = ("loraprune-ds run", "--config", "launch/configs/quickstart.yaml")
# A Python that lacks them imports what a callback and its saves need, and all that its results are read with.
WITHOUT = """
import sys
for name in ("deepspeed", "gguf", "matplotlib", "tensorboard", "sentencepiece.sentencepiece_model_pb2"):
    sys.modules[name] = None
import loraprune_ds.export.formats, loraprune_ds.report.report, loraprune_ds.session.live_export
from loraprune_ds import LoraPruneCallback, Pruning, drop_layers, linear_names, open_result, prepare_model
from loraprune_ds.cli import compare, evaluate, export, plan
LoraPruneCallback(None)
"""


def install(monkeypatch: pytest.MonkeyPatch, **packages: str | None) -> None:
    """Pretends that these versions are installed. None: no version."""
    real = versions.installed
    monkeypatch.setattr(versions, "installed", lambda name: packages.get(name, real(name)))


def test_the_callback_imports_without_what_only_others_need() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT], check=True, cwd=ROOT)


@pytest.mark.parametrize("installed", [None, "0.16.9"])
def test_a_run_without_deepspeed_ends_before_ranks_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: str | None
) -> None:
    install(monkeypatch, deepspeed=installed)
    monkeypatch.setattr(run.os, "execv", lambda *command: pytest.fail("ranks start"))
    monkeypatch.setattr(sys, "argv", [*LAUNCH, "--set", f"output_dir={tmp_path / 'out'}"])
    must_name(f"0.18.9 {installed} loraprune_ds[deepspeed] deepspeed=null", run.launch)
    must_name("0.18.9 loraprune_ds[deepspeed]", run.join_ranks, sharded=True)


def test_own_commands_name_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        install(patched, transformers="5.16.1")
        must_name("transformers 5.24 5.16.1", run.join_ranks, sharded=False)
    install(monkeypatch, peft="0.20.0")
    must_name("peft 0.21.2 0.20.0", run.join_ranks, sharded=False)


def test_an_old_deepspeed_is_refused_on_zero_3_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, deepspeed="0.16.9")
    LoraPruneCallback(PruneConfig())
    monkeypatch.setattr(callback, "is_deepspeed_zero3_enabled", lambda: True)
    must_name("0.18.9 0.16.9", LoraPruneCallback, PruneConfig())


def test_a_family_that_transformers_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "CONFIG_MAPPING", {"llama": None})
    monkeypatch.setattr(family, "__version__", "5.6.0")
    assert family.find_family("pruned_llama", "here") is family.LLAMA
    must_name("internlm3 5.6.0 here", family.find_family, "internlm3", "here")


def test_a_result_without_pictures_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert versions.can_show("matplotlib")
    assert not caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for package in ("matplotlib", "tensorboard"):
        assert not versions.can_show(package)
        assert f"no pictures by {package}: pip install 'loraprune_ds[pictures]'" in caplog.text


def test_an_export_to_gguf_names_its_package_before_it_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    contents = FolderContents(tmp_path, "is a model", tmp_path / "model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    must_name("pip install gguf", export, contents, "gguf-f16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_find_no_room_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * GB, total=2 * GB)
    )
    check_room(tmp_path, GB, "bfloat16")
    must_name(f"{tmp_path}/new 2.0 4.0 disk", check_room, tmp_path / "new", GB, "float32")


def test_a_callback_that_finds_no_room_for_its_sizes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model(make_tiny_llama(tmp_path / "dense", layers=6)).train()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    args: Any = SimpleNamespace(output_dir=tmp_path / "new", report_to=[])
    state = TrainerState(max_steps=STEPS)
    begin = LoraPruneCallback(PRUNE).on_train_begin
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000, total=1000))
    must_name(f"{tmp_path}/new room", begin, args, state, None, model=model, optimizer=optimizer)


class Unsaved:
    """A tokenizer whose save fails like sentencepiece's with another protobuf."""

    def save_pretrained(self, folder: Path) -> None:
        raise RuntimeError("Detected mismatched Protobuf Gencode/Runtime version suite")


class Unread:
    """A tokenizer whose files no export can read."""

    def save_pretrained(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [(Unsaved(), "saved RuntimeError Protobuf"), (Unread(), "readable tokenizer")],
)
def test_what_no_save_could_write_is_refused_before_the_first_step(
    tmp_path: Path, tokenizer: Unsaved | Unread, named: str
) -> None:
    model = make_model(make_tiny_llama(tmp_path / "dense", layers=6)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(trained, lr=0.1)
    must_name(named, Pruning, model, optimizer, PRUNE, STEPS, tokenizer=tokenizer)
