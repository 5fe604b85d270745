"""A CPU rank's memory: compiled kernels it keeps, unused heap, and the peak of a step."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from loraprune_ds.cli.run import join_ranks
from loraprune_ds.ranks import device
from loraprune_ds.ranks.device import (
    KERNEL_CACHES,
    StepPeak,
    limit_kernels,
    resident_bytes,
    trim_heap,
)
from loraprune_ds.zero.device import empty_host_cache

MB = 1_000_000
ONEDNN, TORCH = KERNEL_CACHES


@pytest.fixture
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KERNEL_CACHES:
        monkeypatch.setenv(name, "")  # so that the test's end restores it
        monkeypatch.delenv(name)


# Kernels

TWO_SHAPES_TWICE = """
import torch
from loraprune_ds.ranks import device
device.KERNEL_CACHES = dict.fromkeys(device.KERNEL_CACHES, "1")
device.limit_kernels()
for n in (16, 32, 16, 32):
    torch.nn.functional.linear(torch.ones(64, 64).bfloat16(), torch.ones(n, 64).bfloat16())
"""


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU compiles no bf16 products"
)
@pytest.mark.usefixtures("no_limits")
def test_the_limits_hold_after_torch_is_imported() -> None:
    """With room for one kernel each product is compiled anew."""
    command, environment = (
        [sys.executable, "-c", TWO_SHAPES_TWICE],
        os.environ | {"ONEDNN_VERBOSE": "profile_create"},
    )
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.count("cache_miss") == 4, answer.stdout


@pytest.mark.usefixtures("no_limits")
def test_our_commands_limit_the_kernels_of_cpu_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TORCH, "7")
    join_ranks(sharded=False)
    assert [os.environ[ONEDNN], os.environ[TORCH]] == [KERNEL_CACHES[ONEDNN], "7"]


@pytest.mark.usefixtures("no_limits")
def test_a_gpu_rank_keeps_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_cpu", lambda: False)
    limit_kernels()
    assert not KERNEL_CACHES.keys() & os.environ.keys()


# The heap


def test_memory_between_used_blocks_goes_back_to_the_system() -> None:
    blocks = [torch.ones(64_000, dtype=torch.uint8) for _ in range(3_000)]
    before = resident_bytes()
    del blocks[:-1]
    trim_heap()
    assert resident_bytes() < before - 150 * MB


# The peak


def hold_and_free(megabytes: int) -> None:
    torch.ones(megabytes * MB, dtype=torch.uint8)


def test_each_step_has_its_own_peak_and_the_process_the_highest() -> None:
    peak = StepPeak()
    assert peak.of_step() == 0
    peaks: list[int] = []
    for megabytes in (300, 150):
        peak.begin()
        start = resident_bytes()
        hold_and_free(megabytes)
        peaks.append((peak.of_step() - start) // MB)
    assert peaks == [pytest.approx(300, abs=30), pytest.approx(150, abs=30)]
    assert peak.of_process() > device.peak_bytes() + 100 * MB


def test_a_system_without_a_reset_gives_no_peak_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "Path", lambda _: Path("/proc/self/no_such_file"))
    peak = StepPeak()
    peak.begin()
    assert peak.of_step() == 0
    assert peak.of_process() > 0


# Pinned memory


@pytest.mark.parametrize(
    "torch_has", ["torch.accelerator.empty_host_cache", "torch._C._host_emptyCache"]
)
def test_pinned_memory_of_a_gpu_is_given_back(
    monkeypatch: pytest.MonkeyPatch, torch_has: str
) -> None:
    """By torch's function, or by that of torch 2.7."""
    gpu = SimpleNamespace(device_name=lambda: "cuda")
    monkeypatch.setattr("loraprune_ds.zero.device.get_accelerator", lambda: gpu)
    monkeypatch.delattr("torch.accelerator.empty_host_cache", raising=False)
    given_back = Mock()
    monkeypatch.setattr(torch_has, given_back, raising=False)
    empty_host_cache()
    given_back.assert_called_once_with()
