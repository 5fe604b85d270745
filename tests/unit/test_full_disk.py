"""A write that fails ends a command with code 1. Input that cannot be read ends it with 2. The line names the file."""

import errno
import json
import os
import subprocess
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch

from loraprune_ds.chats.collect import collect
from loraprune_ds.checkpoint.save import Staging, write_step
from loraprune_ds.cli.after import measure_after
from loraprune_ds.config import EvaluateConfig, RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import write_json
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report.records import MetricsLog
from loraprune_ds.report.reporters import TensorBoardLog
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.train.output import OutputFolder
from tests.oracle.models import make_tiny_llama
from tests.support.chat_model import make_chat_model
from tests.support.refusals import full_disk
from tests.support.run_records import step_record
from tests.unit.test_output import run_status

Act = Callable[[Path], object]  # in a folder


def exit_code(named: str, act: Act, folder: Path) -> int:
    """Returns the code of an action that fails. Its line must begin with these words."""
    with pytest.raises(UserError) as caught:
        act(folder)
    line = str(caught.value)
    assert named in line
    assert "\n" not in line
    assert "Errno" not in line
    return caught.value.exit_code


def failing(code: int) -> Act:
    def read(folder: Path) -> None:
        raise OSError(code, os.strerror(code), str(folder / "input"))

    return read


@pytest.mark.parametrize(
    ("read", "named", "code"),
    [
        (lambda folder: (folder / "input").read_text(), "{}/input cannot be read: No such file", 2),
        (lambda folder: folder.read_text(), "{} cannot be read: Is a directory", 2),
        (failing(errno.EACCES), "{}/input cannot be read: Permission denied", 2),
        (failing(errno.EIO), "{}/input cannot be read: Input/output error", 1),
        (failing(errno.EDQUOT), "{}/input cannot be written: Disk quota exceeded", 1),
        (lambda _: Path("/dev/full").write_text("a cache"), "cannot be written: No space left", 1),
    ],
)
def test_what_cannot_be_read_is_bad_input_unless_the_disk_fails(
    tmp_path: Path, read: Act, named: str, code: int
) -> None:
    def act(folder: Path) -> None:
        Communicator().all_or_raise(lambda: read(folder))

    assert exit_code(named.format(tmp_path), act, tmp_path) == code


def start(folder: Path) -> None:
    config = RunConfig(output_dir=str(folder / "out"))
    output = OutputFolder(config.to_dict())
    with full_disk():
        output.create(config)


def write_status(folder: Path) -> None:
    with full_disk():
        run_status(folder).end("finished")


def record(folder: Path) -> None:
    log = MetricsLog(folder / "metrics.jsonl")
    with full_disk():
        log.write(step_record(1))


def draw_curves(folder: Path) -> None:
    log = TensorBoardLog(folder)
    # its thread would print a traceback of its own
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("torch.utils.tensorboard.SummaryWriter.flush", Mock(side_effect=full)):
        log.write(step_record(1))


def save(folder: Path) -> None:
    staging = Staging(Communicator(), folder / "step-1", "step")
    with full_disk():
        staging.write("state.json", lambda path: path.write_text("x"))
    staging.publish()


def save_passes(folder: Path) -> None:
    """On a rank that writes nothing else."""
    passes = SimpleNamespace(steps=[1], to_plain=lambda: {"steps": [torch.zeros(1000)]})
    model = SimpleNamespace(rank=1, world_size=2, lora_parameters=list, trained_parameters=list)
    staging = Staging(Communicator(), folder / "step-1", "step")
    with full_disk():
        write_step(staging, Mock(model=model, passes=passes), Mock(), Mock())
    staging.publish()


def measure(folder: Path) -> None:
    one = {"name": "model", "method": None, "parameters": 1, "removed": 0.5, "values": {}}
    write_json(folder / "report.json", {"measured": one})
    result = json.dumps({"measured": one})
    answer = SimpleNamespace(returncode=0, stdout=result)
    with patch.object(subprocess, "run", Mock(return_value=answer)), full_disk():
        measure_after(
            RunConfig(output_dir=str(folder), evaluate=EvaluateConfig(after=["piqa"])),
            folder,
            Mock(),
        )


def export_model(folder: Path) -> None:
    model = make_tiny_llama(folder / "model")
    with full_disk():
        export(find_contents(model), "hf", folder / "out")


def draw_chats(folder: Path) -> None:
    model = make_chat_model(folder / "model")
    how = {
        "prompts": None,
        "text": None,
        "max_new_tokens": 3,
        "seed": 0,
        "batch_size": 4,
        "engine": "transformers",
    }
    options = Namespace(model=str(model), out=folder / "chats.jsonl", tokens=9, **how)
    with full_disk():
        collect(options, Communicator())


def name_base(folder: Path) -> None:
    write_json(folder / "adapter_config.json", {"r": 4})
    training = Mock()
    training.model.comm = Communicator()
    training.model.shape.linears.return_value = []
    with full_disk():
        Pruning.save_base(training, folder / "base", folder)


WRITERS: list[Act] = [
    start,
    write_status,
    record,
    draw_curves,
    save,
    save_passes,
    measure,
    export_model,
    draw_chats,
    name_base,
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_no_bad_input(tmp_path: Path, write: Act) -> None:
    assert exit_code(f"{tmp_path}", write, tmp_path) == 1


def test_an_output_folder_that_cannot_be_made_is_bad_input(tmp_path: Path) -> None:
    def create(folder: Path) -> None:
        config = RunConfig(output_dir="/proc/nowhere/out")
        OutputFolder(config.to_dict()).create(config)

    assert exit_code("output_dir /proc/nowhere/out", create, tmp_path) == 2
