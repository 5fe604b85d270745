"""Checks that unusable input ends every rank with code 2 and one clear line, before anything is written."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from tests.support.bad_input import Make, arguments, assert_refused, copy_of_model, file_at
from tests.support.launching import fork_ranks
from tests.support.refusals import edit, remove


@dataclass(frozen=True)
class Wrong:
    """Holds overrides that spoil a good run, and words of the error. "{here}" is the test's own folder."""

    name: str
    overrides: str
    words: tuple[str, ...]
    make: Make | None = None
    ranks: int = 1

    def __str__(self) -> str:
        return self.name


MODEL, DS = "model.path={here}/model", "deepspeed={here}/ds.json"
# Unit tests have more.
WRONG = (
    Wrong("no such model", "model.path={here}/model", ("model.path",)),
    Wrong("model on no hub", "model.path=nobody/nothing", ("model.path", "nobody/nothing", "hub")),
    Wrong("no tokenizer", MODEL, ("tokenizer",), copy_of_model(remove("tokenizer.json"))),
    Wrong(
        "text too short",
        "data.path={here}/short.txt",
        ("short.txt", "4"),
        file_at("short.txt", "Few words. " * 12),
    ),
    Wrong(
        "ranks, no download",
        "train.global_batch_size=6 model.path=nobody/nothing",
        ("2 ranks",),
        ranks=2,
    ),
    Wrong("LoRA rank", "lora.r=4096", ("lora.r 4096", "hidden_size 32")),
    Wrong("window", "data.window=4096", ("data.window 4096", "512")),
    Wrong("attention", "model.attn_implementation=flash", ("attn_implementation flash",)),
    Wrong(
        "activation",
        MODEL,
        ("config.json", "zelu"),
        copy_of_model(edit("config.json", hidden_act="zelu")),
    ),
    Wrong("no ds_config", DS, ("deepspeed", "ds.json")),
    Wrong(
        "output_dir in a file", "output_dir={here}/file/out", ("output_dir",), file_at("file", "")
    ),
    Wrong("endless output_dir", "output_dir={here}/" + 300 * "x", ("output_dir",)),
    Wrong("read-only output_dir", "output_dir=/proc/out", ("output_dir /proc/out",)),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_input_is_one_line_before_anything_is_written(
    wrong: Wrong, material: Path, tmp_path: Path
) -> None:
    here, outputs = tmp_path / "here", tmp_path / "outputs"
    here.mkdir()
    outputs.mkdir()
    if wrong.make:
        wrong.make(material, here)
    before = sorted(here.rglob("*"))
    words = [word.format(here=here) for word in wrong.words]
    overrides = wrong.overrides.format(here=here).split()
    first, *others = fork_ranks(arguments(material, here, *overrides), outputs, ranks=wrong.ranks)
    assert_refused(first, *words)
    assert first.out == ""
    assert [(rank.code, rank.out, rank.err) for rank in others] == [(2, "", "")] * len(others)
    assert sorted(here.rglob("*")) == before


def test_a_config_must_be_named(tmp_path: Path) -> None:
    assert_refused(fork_ranks([], tmp_path)[0], "--config")


def lose_a_private_method() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    del DeepSpeedZeroOptimizer_Stage3.set_grad_positions


def lose_a_private_module() -> None:
    sys.modules["loraprune_ds.train.run"] = None  # type: ignore[assignment]  # importing it fails


def have_no_float16() -> None:
    """Some CPUs have it."""
    from deepspeed.accelerator import get_accelerator

    mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=False).start()


@pytest.mark.parametrize(
    ("lose", "words"),
    [
        (
            lose_a_private_method,
            ("deepspeed 0.", "DeepSpeedZeroOptimizer_Stage3.set_grad_positions"),
        ),
        (lose_a_private_module, ("loraprune_ds.train.run",)),
        (have_no_float16, ("model.dtype float16", "cpu")),
    ],
)
def test_a_lack_is_named(
    lose: Callable[[], None], words: tuple[str, ...], material: Path, tmp_path: Path
) -> None:
    given = arguments(
        material, tmp_path, *(["model.dtype=float16"] if lose is have_no_float16 else [])
    )
    (ended,) = fork_ranks(given, tmp_path, before=lose)
    assert_refused(ended, *words)
    assert not (tmp_path / "out").exists()


def be_nobody() -> None:
    """Gives up root's rights. Access is checked for the real user, and files are opened as the effective one."""
    if os.geteuid() == 0:
        os.setreuid(65534, -1)


def test_a_read_only_folder_is_told_before_the_data_is_read(material: Path, tmp_path: Path) -> None:
    given = arguments(material, tmp_path, "output_dir=/proc/me/out", "data.path=/nowhere.txt")
    (ended,) = fork_ranks(given, tmp_path, before=be_nobody)
    assert_refused(ended, "output_dir /proc/me/out: /proc is not writable")
