"""Runs the parts of tests/gpu.sh, one process each, and shows their rows."""

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
from loraprune_ds.units import aligned
from tests.benchmarks.running import RESULTS, ROOT, make_parser, origin

# In the order of what each decides. A part is a module of this package and a function in it.
PARTS = "kernels.gemm runs.whole_run runs.beside_cpu training.steps training.cuts kernels.scoring runs.fp16".split()
PARTS += "training.offload kernels.refitting runs.two_ranks runs.fsdp2".split()
MOST_SECONDS = 480.0  # of a part
LEAST_SECONDS = 30.0  # with less time left, no part is begun
CUT_OFF = "cut off before its end"


def main() -> int:
    """Returns the exit code: 0 if all parts have a result, 1 if one failed or time ran out."""
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no part after that")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of the results")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help="of " + " ".join(PARTS),
    )
    arguments = parser.parse_args()
    end, card = time.monotonic() + 60 * arguments.minutes, card_name()
    folder = arguments.out / re.sub(r"\W+", "-", card)
    folder.mkdir(parents=True, exist_ok=True)
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
        # stays, if this process is killed
        write_json(path, {"error": CUT_OFF, "card": card, **origin(card)})
        began = time.monotonic()
        error = run_part(part, path, min(MOST_SECONDS, left))
        found = read_json(path) | {"error": error, "seconds": time.monotonic() - began}
        write_json(path, {key: value for key, value in found.items() if value is not None})
    results = {part: read_json(path) for part, path in paths.items() if path.exists()}
    print("\n".join(table(results)))
    return (
        0
        if results.keys() >= set(arguments.only)
        and not any("error" in found for found in results.values())
        else 1
    )


def card_name() -> str:
    """Names the device. Another process asks, so that this one holds nothing of the card."""
    code = "from loraprune_ds.ranks.device import device_name; print(device_name())"
    asked = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return asked.stdout.splitlines()[-1]


def run_part(part: str, path: Path, seconds: float) -> str | None:
    """Runs one part in its own process, which adds its rows to `path`. Returns its last lines if it failed."""
    module, _, function = part.partition(".")
    return run_code(
        f"from tests.benchmarks.gpu_day.{module} import {function}\n{function}(found)",
        path,
        seconds,
    )


def run_code(code: str, path: Path, seconds: float) -> str | None:
    """Does so with Python code, to which `found` is a `Found`."""
    code = f"from tests.benchmarks.gpu_day.found import Found\nfound = Found({str(path)!r})\n{code}"
    with tempfile.TemporaryFile("w+") as log:
        outputs: Any = {"stdout": log, "stderr": log, "start_new_session": True}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **outputs)
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
            planned, measured = (
                "" if row[key] is None else f"{row[key]:.4g}" for key in ("planned", "measured")
            )
            rows.append((part, row["what"], planned, measured))
        for key in ("skipped", "error"):
            if key in found:
                lines = [line for line in found[key].split("\n") if line.strip()]
                rows.append(
                    (part, f"{key}: {lines[-1][:100] if lines else 'no word of it'}", "", "")
                )
    return ["", *aligned(rows, "<<>>")]


if __name__ == "__main__":
    sys.exit(main())
