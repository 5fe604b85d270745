"""A process that stood still while another one took over its run destroys nothing when it wakes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loraprune_ds.checkpoint.layout import numbered, step_folder, verify
from tests.integration.launching import RUN, clean_environment, fork_ranks, read_json
from tests.integration.resuming import losses, write_run

STEPS = 8


def asleep(process: "subprocess.Popen[str]") -> bool:
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    assert process.poll() is None, process.communicate()
    return state == "T"


@pytest.mark.parametrize("point", ["backward@20", "save.step_after_rename@2", "finish.reported@1"])
def test_a_superseded_process_leaves_the_checkpoints_of_its_successor(point: str, tmp_path: Path) -> None:
    """Checks with one rank. It sleeps in step 4, between its checkpoint and removing older ones, or at its very end."""
    train = {"steps": STEPS, "recovery_steps": 0}
    config = write_run(tmp_path, train=train, prune={"prune_every": 3}, checkpoint={"every": 2, "keep_last": 2})
    out, command = tmp_path / "out", ["--config", str(config)]
    fault = {"LORAPRUNE_FAULT": f"{point}:0:{int(signal.SIGSTOP)}"}
    first = subprocess.Popen(
        [sys.executable, str(RUN), *command], env=clean_environment() | fault, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not asleep(first) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert asleep(first)
        (second,) = fork_ranks([*command, "--resume", "auto"], tmp_path)
        assert second.code == 0, second.everything
        assert asleep(first)
        os.kill(first.pid, signal.SIGCONT)
        _, said = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 1, said
    assert "Traceback" not in said
    assert said.endswith(f"error: output_dir {out}: another process has taken over this run, so this one ends\n")
    assert numbered(out / "checkpoints", "step") == [STEPS - 2, STEPS]
    verify(step_folder(out / "checkpoints", STEPS))
    assert read_json(out / "status.json")["state"] == "finished"
    assert len(losses(out)) == STEPS
    assert (out / "model" / "config.json").is_file()
