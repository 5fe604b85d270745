"""Runs the parts of tests/gpu.sh, one process each, and shows their rows."""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraprune_ds.files import read_json, write_json
from loraprune_ds.report.report import hardware, versions
from loraprune_ds.units import aligned

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "benchmarks" / "results" / "gpu"
# In the order of what each decides. A part is a module of this package and a function in it.
PARTS = (
    "kernels.gemm",
    "runs.whole_run",
    "runs.beside_cpu",
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
CUT_OFF = "cut off before its end"


def main() -> int:
    """Returns the exit code: 0 if all parts have a result, 1 if one failed or time ran out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no part after that")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="of " + " ".join(PARTS))
    arguments = parser.parse_args()
    end, card = time.monotonic() + 60 * arguments.minutes, card_name()
    folder = arguments.out / re.sub(r"\W+", "-", card)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"card": card, "versions": versions(), "hardware": hardware(card)}
    paths = {part: folder / f"{part}.json" for part in PARTS}
    for part in arguments.only:
        path = paths[part]
        left = end - time.monotonic()
        if path.exists() and "error" not in read_json(path):
            continue
        if left < LEAST_SECONDS:
            print(f"{part}: no time left; call it again to go on")
            break
        print(f"{part} ...", flush=True)
        write_json(path, {"error": CUT_OFF, **facts})  # stays, if this process is killed
        began = time.monotonic()
        error = run_part(part, path, min(MOST_SECONDS, left))
        found = {key: value for key, value in read_json(path).items() if key != "error"}
        found["seconds"] = time.monotonic() - began
        write_json(path, found if error is None else {**found, "error": error})
    results = {part: read_json(path) for part, path in paths.items() if path.exists()}
    print("\n".join(table(results)))
    return 0 if results.keys() >= set(arguments.only) and not any("error" in found for found in results.values()) else 1


def card_name() -> str:
    """Names the device. Another process asks, so that this one holds nothing of the card."""
    code = "from loraprune_ds.zero.device import device_name; print(device_name())"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return asked.stdout.splitlines()[-1]


def run_part(part: str, path: Path, seconds: float) -> str | None:
    """Runs one part in its own process, which adds its rows to `path`. Returns its last lines if it failed."""
    module, _, function = part.partition(".")
    return run_code(f"from tests.benchmarks.gpu_day.{module} import {function}\n{function}(found)", path, seconds)


def run_code(code: str, path: Path, seconds: float) -> str | None:
    """Does so with Python code, to which `found` is a `Found`."""
    before = "import sys\nfrom pathlib import Path\nfrom tests.benchmarks.gpu_day.found import Found\n"
    code = f"{before}found = Found(Path(sys.argv[1]))\n{code}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            returned = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"no end after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # else its runs would keep the card
            process.wait()
        log.seek(0)
        return None if returned == 0 else log.read()[-2000:]


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Lists every row: what, planned, measured. A part may have rows and an error after them."""
    rows = [("part", "", "planned", "measured")]
    for part, found in results.items():
        for row in found.get("rows", []):
            rows.append((part, row["what"], _number(row.get("planned")), _number(row["measured"])))
        for key in ("skipped", "error"):
            if key in found:
                lines = [line for line in found[key].split("\n") if line.strip()]
                rows.append((part, f"{key}: {lines[-1][:100] if lines else 'no word of it'}", "", ""))
    return ["", *aligned(rows, "<<>>")]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
