"""The quickstart from the wheel, with fewer steps, in a folder without the checkout. See tests/run_heavy.sh."""

import json
import subprocess
from pathlib import Path

from tests.integration.heavy.results import TAKES_MINUTES
from tests.integration.launching import read_json, write_text
from tests.integration.test_wheel import build_wheel, install_wheel, without_checkout

pytestmark = TAKES_MINUTES


def test_the_quickstart_runs_from_the_wheel(tmp_path: Path) -> None:
    programs = install_wheel(build_wheel(tmp_path), tmp_path / "environment")
    home = tmp_path / "elsewhere"
    home.mkdir()

    def start(*arguments: str) -> str:
        command = [str(programs / "loraprune-ds"), *arguments]
        done = subprocess.run(command, cwd=home, env=without_checkout(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    start("run", "--ranks", "2", "--config", "launch/configs/quickstart.yaml", "--set", "train.steps=12")
    report = read_json(home / "runs/quickstart/report.json")
    assert report["versions"]["commit"] is None  # it came from the wheel
    text = write_text(home / "text.txt", 20_000)
    measured = json.loads(start("evaluate", "runs/quickstart", "--text", str(text), "--json"))
    assert 1 < measured["perplexity"] < 100
    assert "\nquickstart " in start("compare", "runs/quickstart")
    start("export", "runs/quickstart", "--format", "gguf-q8_0")
    assert list(home.glob("quickstart-gguf-q8_0/*.gguf"))
