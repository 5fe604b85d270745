"""Stops and resumes as a user does: a stop file, the launcher, `--resume auto`."""

import json
import threading
import time
from pathlib import Path

from tests.integration.launching import fork_ranks, launch
from tests.integration.resuming import CUTS, STEPS, losses, write_run

STOP_AFTER = CUTS[1] + 1


def touch_stop_after(out: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = out / "status.json"
        if status.exists() and json.loads(status.read_text())["step"] >= step:
            (out / "STOP").touch()
            return
        time.sleep(0.02)


def test_a_stop_file_saves_and_the_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    config = str(write_run(tmp_path, checkpoint={"every": 6, "keep_last": 2}))
    out, straight = tmp_path / "out", tmp_path / "straight"

    stopper = threading.Thread(target=touch_stop_after, args=(out, STOP_AFTER))
    stopper.start()
    stopped = launch(["--config", config])
    stopper.join()
    assert stopped.code == 85, stopped.everything
    status = json.loads((out / "status.json").read_text())
    assert status["state"] == "stopped"
    assert STOP_AFTER <= status["step"] < STEPS
    assert not (out / "STOP").exists()

    (refused,) = fork_ranks(["--config", config], tmp_path)
    assert refused.code == 2, refused.everything
    where = f"stopped at step {status['step']} of {STEPS}"
    assert f"holds an unfinished run ({where}); go on with --resume auto" in refused.err

    (out / "STOP").touch()  # meant for a process that is gone
    finished = launch(["--config", config, "--resume", "auto"])
    assert finished.code == 0, finished.everything
    assert f"{out / 'STOP'} was there before this start: removed" in finished.err
    assert json.loads((out / "status.json").read_text())["state"] == "finished"

    ended = fork_ranks(["--config", config, "--set", f"output_dir={straight}"], tmp_path, ranks=2, timeout=300)
    assert ended[0].code == 0, ended[0].everything
    report = json.loads((out / "report.json").read_text())
    assert report["resumed_from"] == [status["step"]]
    assert [cut["step"] for cut in report["prune_steps"]] == CUTS
    assert report["perplexity"] == json.loads((straight / "report.json").read_text())["perplexity"]
    assert (out / "kept_groups.json").read_bytes() == (straight / "kept_groups.json").read_bytes()
    assert losses(out) == losses(straight)
    assert len(losses(out)) == STEPS
