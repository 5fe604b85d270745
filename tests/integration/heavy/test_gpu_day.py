"""tests/gpu.sh runs end to end on a CPU, at tiny sizes. Skipped unless tests/run_heavy.sh starts it."""

import os
import subprocess
from pathlib import Path

from tests.benchmarks.gpu_day.__main__ import PARTS
from tests.integration.heavy.results import TAKES_MINUTES
from tests.support.launching import ROOT, read_json

pytestmark = TAKES_MINUTES


def test_every_part_has_a_result(tmp_path: Path) -> None:
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = ["bash", "tests/gpu.sh", "--out", str(tmp_path)]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = {part: read_json(tmp_path / "cpu" / f"{part}.json") for part in PARTS}
    assert {found["card"] for found in results.values()} == {"cpu"}
    assert [part for part, found in results.items() if "skipped" in found] == ["runs.fp16"]
    assert all(found["rows"] for part, found in results.items() if part != "runs.fp16")
