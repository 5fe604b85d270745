"""The nodes of a job agree if all are fit, and the first one names those that are not."""

import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import preflight
from launch.preflight import Rendezvous, Unfit, check_ranks, check_visible, probe_file
from loraprune_ds.zero.probe import Probe, probe_node
from tests.integration.launching import ROOT, clean_environment, free_port

NODES = ["localhost", "gpu2", "gpu3"]  # all meet at the first one


def agree(*checks: Callable[[], None], absent: tuple[int, ...] = (), timeout: float = 20) -> list[bool]:
    """Returns what each node hears. Each is a thread."""
    port = free_port()

    def be_node(index: int) -> bool:
        return Rendezvous(NODES, index, port, timeout).agree("stage", checks[index])

    present = [index for index in range(len(NODES)) if index not in absent]
    with ThreadPoolExecutor(len(NODES)) as pool:
        return list(pool.map(be_node, present))


def fit() -> None:
    pass


def unfit() -> None:
    raise Unfit("2 accelerators\nfor 4 ranks")


def test_all_fit(capfd: pytest.CaptureFixture[str]) -> None:
    assert agree(fit, fit, fit) == [True, True, True]
    assert capfd.readouterr().err == ""


def test_a_bad_node_is_named_once_and_all_hear_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert agree(fit, fit, unfit) == [False, False, False]
    assert capfd.readouterr().err == "preflight: gpu3: 2 accelerators for 4 ranks\n"


def test_a_node_that_does_not_come_is_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "VERDICT_READ_WITHIN", 1.0)
    assert agree(fit, fit, fit, absent=(1,), timeout=2) == [False, False]
    assert "preflight: gpu2: no answer in 2 s\n" in capfd.readouterr().err


def test_the_first_node_cannot_be_reached() -> None:
    with pytest.raises(Unfit, match=r"cannot meet the others at localhost:\d+: "):
        Rendezvous(NODES, 1, free_port(), 1)


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "VISIBLE_WITHIN", 0.0)
    with probe_file(tmp_path / "runs" / "mine") as probe:
        assert probe.parent == tmp_path
        check_visible(probe, "gpu1")
    with pytest.raises(Unfit, match=r"output_dir is not shared: it has no .*, which gpu1 has written"):
        check_visible(probe, "gpu1")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), probe_file(tmp_path / "file" / "mine"):
        pass


def test_gloo_that_finds_no_way_to_the_others_is_told_its_variable(tmp_path: Path) -> None:
    arguments = ["--nodes", "localhost", "--port", str(free_port()), "--output", str(tmp_path)]
    ended = subprocess.run(
        [sys.executable, "launch/preflight.py", *arguments],
        cwd=ROOT,
        env=clean_environment() | {"GLOO_SOCKET_IFNAME": "nosuch"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    expected = "gloo does not reach the other nodes, GLOO_SOCKET_IFNAME must name the network interface that does: "
    assert f"preflight: localhost: {expected}" in ended.stderr
    assert "nosuch" in ended.stderr


def test_every_rank_takes_part_and_the_speed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Two nodes of two ranks each. Each node is a thread, each rank a process."""
    port = free_port()

    def be_node(index: int) -> bool:
        rendezvous = Rendezvous(NODES[:1] * 2, index, port, 120)
        return rendezvous.agree("ranks", lambda: check_ranks(rendezvous, 2))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(be_node, range(2))) == [True, True]
    out, err = capsys.readouterr()
    assert re.fullmatch(r"preflight: all-to-all over 4 ranks by gloo: [\d.e-]+ GB/s to the slowest\n", out)
    assert err == ""


def test_a_rank_that_cannot_take_part_is_named() -> None:
    """The backend of GPUs on a machine without one."""
    with ThreadPoolExecutor(1) as pool:
        port = free_port()
        rendezvous = pool.submit(Rendezvous, ["localhost"], 0, port, 20.0).result()
        problem = probe_node(Probe("localhost", port, "nccl", 0, 1, 1, 20.0))
    assert problem is not None
    assert problem.startswith("rank 0: ")
    assert "\n" not in problem
    assert rendezvous.index == 0
