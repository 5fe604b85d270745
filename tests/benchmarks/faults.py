"""Proves that runs survive faults. Kills them, stops them, takes their disk, then resumes them.

    python -m tests.benchmarks.faults [--random 20] [--only REGEX] [--missing] [--most N] [--jobs 1] [--out FILE]

Each row tells where the fault struck, how many steps were lost, the seconds until no process of the job was left, and
whether the resumed run ends with the undisturbed run's kept_groups.json, byte for byte. Exit code 1 unless all do.

The model is tiny, on two CPU ranks under the real launcher. The full-disk case needs root. The suite `levers` has all
quality settings: `fisher`, refit, distillation and recovery. `callback` strikes
transformers' Trainer.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.report import report
from tests.benchmarks.fault_suites import EVERY, SUITES, Suite, result_of, start
from tests.benchmarks.fault_table import RANKS, Fault, fault_table
from tests.benchmarks.running import RESULTS, ROOT, make_parser, origin

GONE = 60.0  # seconds in which a job must be gone: the promise


@dataclass
class Row:
    """One line of the table."""

    fault: str
    hit: bool = False
    exit_code: int | None = None
    status: str | None = None
    step_reached: int = -1
    resumed_at: int | None = None
    steps_lost: int = -1
    seconds_until_gone: float = -1.0
    same_result: bool = False
    problem: str | None = None
    commit: str | None = field(default_factory=lambda: report.commit(ROOT))
    said: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return (
            self.hit
            and self.same_result
            and self.problem is None
            and 0 <= self.seconds_until_gone <= GONE
        )


def carry_out(fault: Fault, suite: Suite) -> Row:
    """The run with its fault, then the resumed one."""
    row = Row(fault.name)
    folder = suite.folder / re.sub(r"\W+", "-", fault.name)
    folder.mkdir()
    out = folder / "disk" / "out" if fault.disk else folder / "out"
    if fault.disk:
        out.parent.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(out.parent)], check=True
        )
    try:
        _strike(fault, row, folder, out, suite)
        if fault.again is not None:
            job = start(folder, out, [*suite.command(out), "--resume", "auto"], fault.again)
            job.seconds_until_gone()
            row.hit &= f"fail-point {fault.again.split(':')[0]}:" in job.text()
        _resume(row, folder, out, suite)
    except (TimeoutError, StopIteration, OSError, UserError, AssertionError) as error:
        row.problem = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    finally:
        if fault.disk:
            subprocess.run(["umount", str(out.parent)], check=True)
    print(f"{'ok  ' if row.good else 'FAIL'} {format_row(row)}", flush=True)
    return row


def _strike(fault: Fault, row: Row, folder: Path, out: Path, suite: Suite) -> None:
    job = start(folder, out, suite.command(out), fault.point)
    if fault.point is not None:
        job.wait_until(lambda: "fail-point" in job.text())
        row.hit = f"fail-point {fault.point.split(':')[0]}:" in job.text()
    elif fault.strike is not None:
        fault.strike(job)
        row.hit = True
    row.seconds_until_gone = round(job.seconds_until_gone(), 1)
    row.exit_code = job.process.wait()
    row.step_reached, row.status = suite.reached(job)
    said = job.text().replace(str(folder.parents[1]), "faults").replace(sys.prefix, ".venv")
    row.said = [
        line[-200:]
        for line in said.splitlines()
        if re.search(r"^error|gone|fail-point|return code", line)
    ]
    if fault.after is not None:
        fault.after(job)
    if fault.expected_codes and row.exit_code not in fault.expected_codes:
        row.problem = f"exit code {row.exit_code}, not {fault.expected_codes}"
    if fault.line not in job.text():
        row.problem = f"the log does not say {fault.line!r}"


def _resume(row: Row, folder: Path, out: Path, suite: Suite) -> None:
    row.resumed_at = suite.newest_good(out)
    row.steps_lost = row.step_reached - (row.resumed_at or 0)
    suite.resume(folder, out)
    row.same_result = result_of(out) == suite.expected
    steps = [
        line["step"]
        for line in map(json.loads, (out / "metrics.jsonl").open())
        if line["kind"] == "step"
    ]
    if steps != list(range(1, suite.steps + 1)):
        row.problem = f"metrics.jsonl has the steps {steps}"
    if row.steps_lost > EVERY:
        row.problem = f"{row.steps_lost} steps lost"


def format_row(row: Row) -> str:
    lost = f"{row.step_reached:>3} {row.resumed_at!s:>5} {row.steps_lost:>5} {row.seconds_until_gone:>6}"
    return f"{row.fault:<62} {lost} {row.exit_code!s:>5} {row.status!s:<9} {row.problem or ''}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--random", type=int, default=20, help="kills at random moments, seeded")
    parser.add_argument(
        "--only", default="", help="faults whose name this regular expression finds"
    )
    parser.add_argument(
        "--missing",
        action="store_true",
        help="only those that FILE has no good row of; keep the rest",
    )
    parser.add_argument("--most", type=int, help="stop after so many; --missing goes on from there")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 2 ranks each")
    parser.add_argument("--out", type=Path, default=RESULTS / "faults.json")
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    table = fault_table(arguments.random)
    kept = [row for row in read_rows(arguments.out) if row.good] if arguments.missing else []
    kept = [row for row in kept if row.fault in {fault.name for fault in table}]
    done, configs = {row.fault for row in kept}, read_json(arguments.out)["configs"] if kept else {}
    faults = [f for f in table if re.search(arguments.only, f.name) and f.name not in done][
        : arguments.most
    ]
    skipped = []
    if os.geteuid() != 0:
        skipped = [
            {"fault": fault.name, "why": "mounting a small tmpfs needs root"}
            for fault in faults
            if fault.disk
        ]
        faults = [fault for fault in faults if not fault.disk]
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        root = Path(name)
        suites = {name: SUITES[name](root / name) for name in {fault.suite for fault in faults}}
        print(f"{'':4} {'fault':<62} at resumed  lost   gone  code status")
        facts = {
            # the rows say at which commit they were found
            "command": "python -m tests.benchmarks.faults",
            "configs": configs | {name: suite.config for name, suite in suites.items()},
            "ranks": RANKS,
            "checkpoint_every": EVERY,
            "skipped": skipped,
            **origin(),
        }
        order = {fault.name: i for i, fault in enumerate(table)}
        rows: list[Row] = []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for row in pool.map(lambda fault: carry_out(fault, suites[fault.suite]), faults):
                rows.append(row)
                write_result(
                    arguments.out, facts, sorted([*kept, *rows], key=lambda r: order[r.fault]), root
                )
    good = sum(row.good for row in rows)
    print(f"{good} of {len(rows)} as promised; in {arguments.out}")
    return 0 if good == len(rows) else 1


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write_result(path: Path, facts: dict[str, Any], rows: list[Row], root: Path) -> None:
    """Writes the table after every fault, so that an interrupted command loses nothing."""
    result = facts | {
        "good": sum(row.good for row in rows),
        "of": len(rows),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1).replace(str(root), "faults") + "\n")


if __name__ == "__main__":
    sys.exit(main())
