"""The commands in launch/ end as they should."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from loraprune_ds.command import check_needs, tell
from loraprune_ds.errors import RankError, UserError

ROOT = Path(__file__).parents[2]
BLOCKED = """
import threading, time, torch
from loraprune_ds.command import leave_on_error

leave_on_error()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
threading.Thread(target=time.sleep, args=(60,)).start()  # Python waits for it before it ends
raise RuntimeError("out of memory")
"""


def test_an_option_without_the_one_it_needs_is_named() -> None:
    needs = {"--num-fewshot": "--tasks", "--public": "--speed or --serve"}
    check_needs(Namespace(num_fewshot=None, tasks=[], public=False, speed=False, serve=None), needs)
    check_needs(Namespace(num_fewshot=0, tasks=["piqa"], public=True, speed=False, serve="vllm"), needs)
    with pytest.raises(UserError, match=r"^--num-fewshot has no effect without --tasks$"):
        check_needs(Namespace(num_fewshot=0, tasks=[], public=False), needs)
    with pytest.raises(UserError, match=r"^--public has no effect without --speed or --serve$"):
        check_needs(Namespace(public=True, speed=False, serve=None), needs)


@pytest.mark.parametrize(
    ("rank", "error", "agreed", "line"),
    [
        ("0", UserError("a"), True, "error: a\n"),
        ("1", UserError("a"), True, ""),
        ("1", UserError("a"), False, "error on rank 1: a\n"),
        ("0", RankError("a"), True, "error: a\n"),
        ("1", RankError("a"), True, "error on rank 1: a\n"),
        ("one", UserError("a"), False, "error on rank one: a\n"),
    ],
)
def test_what_a_rank_met_alone_it_tells_itself(
    rank: str, error: UserError, agreed: bool, line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("loraprune_ds.command.GRACE", 0.0)
    tell(error, agreed=agreed)
    assert capfd.readouterr().err == line


def test_an_unexpected_error_ends_the_process_even_if_nothing_reads_its_traceback() -> None:
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], cwd=ROOT, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(timeout=30) == 1


def test_an_unexpected_error_ends_the_process_right_after_its_traceback() -> None:
    ended = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback (most recent call last):")
    assert ended.stderr.endswith("RuntimeError: out of memory\n")
