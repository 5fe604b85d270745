"""Jobs of real processes: a node is lost, a process stands still and wakes, a user stops a run and goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from loraprune_ds.checkpoint.layout import numbered, step_folder, verify
from tests.support import launching
from tests.support.resuming import CUTS, STEPS, losses, write_run

# A node that is lost ends the job on the others. Two launchers on this machine stand for two nodes

SILENCE = 3.0  # seconds
STARTED = 120.0  # seconds to import and prepare on a busy machine


def start_node(node: int, config: Path, hosts: Path, port: int) -> subprocess.Popen[str]:
    """Starts one launcher with one rank, in its own process group."""
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--quiet",
        f"--hostfile={hosts}",
        "--no_ssh",
    ]
    launcher += [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    command = [*launcher, str(launching.RUN), "--config", str(config)]
    return launching.start(
        command, launching.ROOT, {"LORAPRUNE_SILENCE": str(SILENCE)}, subprocess.DEVNULL
    )


@pytest.mark.heavy  # tests/numerics/test_heartbeat.py is in CI
@pytest.mark.parametrize(("how", "lost"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 0)])
def test_the_job_ends_soon_after_a_node_is_lost(
    tmp_path: Path, how: signal.Signals, lost: int
) -> None:
    config = write_run(tmp_path, train={"steps": 100_000}, checkpoint={"every": None})
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    port = launching.free_port()
    nodes = [start_node(node, config, tmp_path / "hosts", port) for node in range(2)]
    try:
        launching.within(
            STARTED,
            lambda: (
                launching.step_of(tmp_path / "out") >= 2
                or any(node.poll() is not None for node in nodes)
            ),
        )
        assert all(node.poll() is None for node in nodes), [
            n.communicate()[1] for n in nodes if n.poll()
        ]
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


# A process that stood still while another one took over its run destroys nothing when it wakes


def asleep(process: "subprocess.Popen[str]") -> bool:
    assert process.poll() is None, process.communicate()
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


@pytest.mark.heavy  # tests/unit/test_output.py is in CI
@pytest.mark.parametrize("point", ["backward@20", "finish.reported@1"])
def test_a_superseded_process_leaves_the_checkpoints_of_its_successor(
    point: str, tmp_path: Path
) -> None:
    """Checks with one rank. It sleeps in step 4, or at its very end."""
    train = {"steps": 8, "recovery_steps": 0}
    config = write_run(
        tmp_path, train=train, prune={"prune_every": 3}, checkpoint={"every": 2, "keep_last": 2}
    )
    out, command = tmp_path / "out", ["--config", str(config)]
    environment = launching.clean_environment() | {
        "LORAPRUNE_FAULT": f"{point}:0:{int(signal.SIGSTOP)}"
    }
    words = [sys.executable, str(launching.RUN), *command]
    first = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        launching.within(60, lambda: asleep(first))
        (second,) = launching.fork_ranks([*command, "--resume", "auto"], tmp_path)
        assert second.code == 0, second.everything
        assert asleep(first)
        os.kill(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 1, said
    assert "Traceback" not in said
    assert said.endswith(
        f"error: output_dir {out}: another process has taken over this run, so this one ends\n"
    )
    assert numbered(out / "checkpoints", "step") == [6, 8]
    verify(step_folder(out / "checkpoints", 8))
    assert launching.read_json(out / "status.json")["state"] == "finished"
    assert len(losses(out)) == 8
    assert (out / "model" / "config.json").is_file()


# A user stops a run by a file and resumes it by the launcher

STOP_AFTER = CUTS[1] + 1


def touch_stop_after(out: Path, step: int) -> None:
    launching.within(120, lambda: launching.step_of(out) >= step)
    (out / "STOP").touch()


def test_a_stop_file_saves_and_the_run_goes_on_to_its_end(tmp_path: Path) -> None:
    config = str(write_run(tmp_path, checkpoint={"every": 6, "keep_last": 2}))
    out = tmp_path / "out"
    stopper = threading.Thread(target=touch_stop_after, args=(out, STOP_AFTER))
    stopper.start()
    stopped = launching.launch(["--config", config])
    stopper.join()
    assert stopped.code == 85, stopped.everything
    status = launching.read_json(out / "status.json")
    assert status["state"] == "stopped"
    assert STOP_AFTER <= status["step"] < STEPS
    assert not (out / "STOP").exists()

    (refused,) = launching.fork_ranks(["--config", config], tmp_path)
    assert refused.code == 2, refused.everything
    where = f"stopped at step {status['step']} of {STEPS}"
    assert f"holds an unfinished run ({where}); go on with --resume auto" in refused.err

    (out / "STOP").touch()  # meant for a process that is gone
    finished = launching.fork_ranks(
        ["--config", config, "--resume", "auto"], tmp_path, ranks=2, timeout=300
    )[0].check()
    assert f"{out / 'STOP'} was there before this start: removed" in finished.err
    assert launching.read_json(out / "status.json")["state"] == "finished"

    report = launching.read_json(out / "report.json")
    assert report["resumed_from"] == [status["step"]]
    assert [cut["step"] for cut in report["prune_steps"]] == CUTS
    assert len(losses(out)) == STEPS
