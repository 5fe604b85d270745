"""`train.deterministic` reaches torch, and the libraries that read the environment once, before anything computes."""

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from loraprune_ds.cli import run as command
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import read_config
from loraprune_ds.errors import UserError
from loraprune_ds.train import run
from loraprune_ds.train.output import OutputFolder
from tests.integration.launching import write_config

NAMES = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")


class Reached(UserError):
    pass


@pytest.fixture(params=[False, True])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, bool]:
    train = {"steps": 1, "deterministic": request.param}
    return write_config(tmp_path / "run.yaml", {"output_dir": str(tmp_path / "out"), "train": train}), request.param


def test_the_environment_has_it_before_ranks_join(monkeypatch: pytest.MonkeyPatch, config: tuple[Path, bool]) -> None:
    found: list[str | None] = []

    def join_ranks() -> None:
        found.extend(os.environ.get(name) for name in NAMES)
        raise Reached("far enough")

    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)
    monkeypatch.setattr(command, "join_ranks", join_ranks)
    monkeypatch.setattr(command, "tell", lambda error, agreed: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "--config", str(config[0])])
    assert command.main() == Reached.exit_code
    assert found == ([":4096:8", "1"] if config[1] else [None, None])


def test_torch_has_it_before_the_model_is_read(monkeypatch: pytest.MonkeyPatch, config: tuple[Path, bool]) -> None:
    def prepare(config: RunConfig, *others: Any, is_first_on_node: bool) -> None:
        raise Reached(str(torch.are_deterministic_algorithms_enabled()))

    monkeypatch.setattr(run, "prepare", prepare)
    monkeypatch.setenv("LOCAL_RANK", "0")
    try:
        with pytest.raises(Reached, match=str(config[1])):
            run.run(OutputFolder(read_config(config[0])), Mock())
    finally:
        torch.use_deterministic_algorithms(False)
