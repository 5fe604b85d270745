"""Requests from outside only set a flag. The step that honours them removes exactly their files."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from loraprune_ds.train import stop
from loraprune_ds.train.stop import NOTHING, SAVE, SAVE_FILE, STOP, STOP_FILE, RequestListener, drop_stale_requests


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[RequestListener]:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    requests = RequestListener(tmp_path, watches_files=True)
    yield requests
    requests.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_stop_that_comes_while_a_save_is_honoured_is_not_lost(requests: RequestListener, tmp_path: Path) -> None:
    assert requests.current() == NOTHING
    (tmp_path / SAVE_FILE).touch()
    assert requests.current() == SAVE
    (tmp_path / STOP_FILE).touch()
    assert requests.current() == STOP
    requests.clear(SAVE)
    assert requests.current() == STOP
    requests.clear(STOP)
    assert list(tmp_path.iterdir()) == []


def test_only_one_rank_looks_at_files(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).touch()
    other = RequestListener(tmp_path, watches_files=False)
    assert other.current() == NOTHING
    other.clear(STOP)
    other.close()
    assert (tmp_path / STOP_FILE).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_stop_and_its_echo_the_same_one(requests: RequestListener, number: signal.Signals) -> None:
    for _ in range(3):
        os.kill(os.getpid(), number)
        assert requests.current() == STOP


def test_only_a_second_interrupt_stops_immediately(requests: RequestListener, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(stop.time, "monotonic", lambda: now)
    signal.raise_signal(signal.SIGINT)
    now = 100.9
    signal.raise_signal(signal.SIGINT)  # the launcher's copy of the first
    now = 101.1
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("variables", "catches"),
    [
        ({"SLURM_PROCID"}, True),
        ({"SLURM_PROCID", "CROSS_RANK"}, False),
        ({"SLURM_PROCID", "TORCHELASTIC_RUN_ID"}, False),
        (set(), False),
    ],
)
def test_usr1_is_caught_only_straight_under_srun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: set[str], catches: bool
) -> None:
    for name in ("SLURM_PROCID", "CROSS_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "0") if name in variables else monkeypatch.delenv(name, raising=False)
    requests = RequestListener(tmp_path, watches_files=False)
    assert (signal.getsignal(signal.SIGUSR1) == requests._on_signal) == catches
    requests.close()


def test_requests_to_an_earlier_process_are_removed_and_told(tmp_path: Path) -> None:
    assert drop_stale_requests(tmp_path) == []
    (tmp_path / STOP_FILE).touch()
    assert drop_stale_requests(tmp_path) == [f"{tmp_path / STOP_FILE} was there before this start: removed"]
    assert list(tmp_path.iterdir()) == []
