"""A node that is lost ends the job on the others. Two launchers on this machine stand for two nodes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration.launching import ROOT, RUN, clean_environment, free_port, read_json
from tests.integration.resuming import write_run

SILENCE = 3.0  # seconds
STARTED = 120.0  # seconds to import and prepare on a busy machine


def start_node(node: int, config: Path, hosts: Path, port: int) -> subprocess.Popen[str]:
    """Starts one launcher with one rank, in a process group of its own."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", f"--hostfile={hosts}", "--no_ssh"]
    launcher += [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return subprocess.Popen(
        [*launcher, str(RUN), "--config", str(config)],
        cwd=ROOT,
        env=clean_environment() | {"LORAPRUNE_SILENCE": str(SILENCE)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(("how", "lost"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1), (signal.SIGSTOP, 0)])
def test_the_job_ends_soon_after_a_node_is_lost(tmp_path: Path, how: signal.Signals, lost: int) -> None:
    config = write_run(tmp_path, train={"steps": 100_000}, checkpoint={"every": None})
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    port = free_port()
    nodes = [start_node(node, config, tmp_path / "hosts", port) for node in range(2)]
    try:
        status, deadline = tmp_path / "out" / "status.json", time.monotonic() + STARTED
        while not (status.exists() and read_json(status)["step"] >= 2):
            assert all(node.poll() is None for node in nodes), [n.communicate()[1] for n in nodes if n.poll()]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(nodes[lost].pid, how)
        began, left = time.monotonic(), nodes[1 - lost]
        _, err = left.communicate(timeout=60)
        # Silence, the grace of as many seconds, and looks of rank 0 and of the others on a busy machine.
        assert time.monotonic() - began < 6 * SILENCE
        assert left.returncode not in (0, None)
        if how == signal.SIGSTOP:  # a killed one closes its connections, of which gloo tells
            assert f"rank {1 - lost}: rank {lost}" in err
            assert f"gave no sign for {SILENCE:g} s: leaving" in err
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(node.pid, signal.SIGKILL)
            node.communicate()
