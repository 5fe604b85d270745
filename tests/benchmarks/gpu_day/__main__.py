"""Runs the parts of tests/gpu.sh, one process each, and shows what they found."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.provenance import hardware, versions
from loraprune_ds.units import aligned
from loraprune_ds.zero.device import device_name

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "gpu"
# In the order of what each decides. A part is a module of this package and a function in it.
PARTS = (
    "kernels.gemm",
    "runs.whole_run",
    "training.steps",
    "training.cuts",
    "kernels.scoring",
    "runs.fp16",
    "training.offload",
    "kernels.refitting",
    "runs.two_ranks",
)
MOST_SECONDS = 480.0  # of a part
LEAST_SECONDS = 30.0  # with less time left, no part is begun


def main() -> int:
    """Returns the exit code: 0 if all parts have a result, 1 if one failed or time ran out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no part after that")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    card = device_name()
    folder, end = arguments.out / re.sub(r"\W+", "-", card), time.monotonic() + 60 * arguments.minutes
    folder.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        path, left = folder / f"{part}.json", end - time.monotonic()
        if path.exists() and "error" not in read_json(path):
            continue
        if left < LEAST_SECONDS:
            print(f"{part}: no time left; call it again to go on")
            break
        print(f"{part} ...", flush=True)
        began = time.monotonic()
        found = run_part(part, min(MOST_SECONDS, left))
        facts = {"card": card, "seconds": time.monotonic() - began, "versions": versions(), "hardware": hardware(card)}
        write_json(path, found | facts)
    results = {part: read_json(folder / f"{part}.json") for part in PARTS if (folder / f"{part}.json").exists()}
    print("\n".join(table(results)))
    return 0 if len(results) == len(PARTS) and not any("error" in found for found in results.values()) else 1


def run_part(part: str, seconds: float) -> dict[str, Any]:
    """Runs one part in a process of its own. Returns its result, or {"error": its last lines}."""
    module, _, function = part.partition(".")
    code = f"import json; from tests.benchmarks.gpu_day.{module} import {function}; print(json.dumps({function}()))"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end after {seconds:.0f} s"}
    if ended.returncode != 0:
        return {"error": ended.stderr[-2000:]}
    return json.loads(ended.stdout.splitlines()[-1])


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lists every row: what, planned, measured. A part without rows has an error or was skipped."""
    rows = [("part", "", "planned", "measured")]
    for part, found in results.items():
        for row in found.get("rows", []):
            rows.append((part, row["what"], _number(row.get("planned")), _number(row["measured"])))
        for key in ("skipped", "error"):
            if key in found:
                lines = [line for line in found[key].split("\n") if line.strip()]
                rows.append((part, f"{key}: {lines[-1][:60]}", "", ""))
    return ["", *aligned(rows, "<<>>")]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
