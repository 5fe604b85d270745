"""Strikes a job with every event, on a real Slurm of three nodes: the list in slurm/README.md.

    python -m tests.slurm.events [--only REGEX] [--out FILE]

Every event must end as said. Its kept groups must equal a run without Slurm on as many ranks (fp32, no dropout).
Exit code 1 unless all do. Needs root on Debian. Takes about ten minutes on two idle cores.
"""

import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.running import RESULTS, make_parser, origin
from tests.slurm.cluster import FOR_GOOD, Job, obstacle, running_cluster
from tests.slurm.lab import EVENTS, PATIENCE, RUN, Lab, Row, carry_out, event, said
from tests.support.finished_runs import snapshot
from tests.support.launching import read_json

NODES = 3  # one more than a job takes, for the one that is lost
SAVED = 5  # a step after which a checkpoint is there


event("2 nodes, 2 ranks each")(
    lambda lab, row: lab.finish(row, lab.submit("two", RANKS_PER_NODE="2"), "two", 4)
)


@event("preempted by a job of higher priority", expected_restarts=(1,))
def preempt(lab: Lab, row: Row) -> None:
    job = started(lab, "preempted", 2)
    options = (f"--nodes={NODES}", "--exclusive", "--partition=high", "--output=/dev/null")
    lab.cluster.execute("sbatch", *options, "--wrap=sleep 1")
    lab.finish(row, job, "preempted")


@event("time limit", expected_restarts=(1,))
def reach_time_limit(lab: Lab, row: Row) -> None:
    """Holds a rank still until Slurm warns, so that even a fast machine does not finish before."""
    job = started(lab, "limited", 2, options=["--signal=B:USR1@60"])
    rank = lab.rank_process("limited", nodes_of(lab, job)[1])
    os.kill(rank, signal.SIGSTOP)
    minutes = int(job.field("RunTime").split(":")[1]) + 3
    lab.cluster.execute("scontrol", "update", f"JobId={job.number}", f"TimeLimit={minutes}")
    job.wait_until(lambda: "got USR1" in job.log(), "told that its time is nearly over", PATIENCE)
    os.kill(rank, signal.SIGCONT)
    job.wait_until(lambda: job.restarts == 1, "requeued", PATIENCE)
    lab.cluster.execute("scontrol", "update", f"JobId={job.number}", "TimeLimit=1-00:00:00")
    lab.finish(row, job, "limited")
    row.remarks = said(job.log(), "got USR1", "the time is over")


def lose(lab: Lab, row: Row, out: str, which: int) -> None:
    """Unplugs a node's network cable. It stays so until the job has ended on the others."""
    job = started(lab, out, SAVED)
    lost = int(nodes_of(lab, job)[which].removeprefix("node"))
    lab.cluster.cut(lost)
    try:
        lab.finish(row, job, out)
        row.remarks = [f"node{lost} lost, ended on {job.field('NodeList')}"]
        before = snapshot(lab.folder / out)
    finally:
        lab.cluster.join(lost)
    lab.wait_until_idle(NODES)
    if changed := snapshot(lab.folder / out).items() ^ before.items():
        row.problem = (
            f"changed by what came back with the lost node: {sorted({name for name, _ in changed})}"
        )


# Slurm now and then takes another node for down as well, for a moment.
event("node lost", expected_restarts=(1, 2))(partial(lose, out="lost", which=1))


@event("rank killed", expected_restarts=(1,))
def kill_rank(lab: Lab, row: Row) -> None:
    """Ends the job. Slurm does not requeue a failed job. A person does."""
    job = started(lab, "killed", SAVED)
    began = time.monotonic()
    os.kill(lab.rank_process("killed", nodes_of(lab, job)[1]), signal.SIGKILL)
    state = job.wait_for_end(PATIENCE)
    row.remarks = [
        f"{state} {time.monotonic() - began - FOR_GOOD:.1f} s after the kill; then scontrol requeue"
    ]
    assert state == "FAILED", job.log()
    assert job.restarts == 0
    requeue(lab, job, 1)
    lab.finish(row, job, "killed")


def started(lab: Lab, out: str, step: int, options: Sequence[str] = (), **variables: str) -> Job:
    """Starts a job of two nodes and waits until it has done `step` steps."""
    job = lab.submit(out, options=options, **variables)
    job.wait_for_step(lab.folder / out, step, PATIENCE)
    return job


def nodes_of(lab: Lab, job: Job) -> list[str]:
    return lab.cluster.execute("scontrol", "show", "hostnames", job.field("NodeList")).split()


def requeue(lab: Lab, job: Job, restarts: int) -> None:
    lab.cluster.execute("scontrol", "requeue", job.number)
    job.wait_until(lambda: job.restarts == restarts, "requeued", PATIENCE)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="events whose name it finds; the other rows stay",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "slurm.json")
    arguments = parser.parse_args()
    if why := obstacle():
        print(f"no Slurm cluster can run here: {why}", file=sys.stderr)
        return 1
    with (
        TemporaryDirectory(prefix="slurm-events-") as folder,
        running_cluster(Path(folder), nodes=NODES) as cluster,
    ):
        lab = Lab(cluster)
        slurm = cluster.execute("sinfo", "--version").strip()
        rows = []
        for name in (name for name in EVENTS if re.search(arguments.only, name)):
            rows.append(carry_out(lab, name))
            write_result(arguments.out, rows, slurm, folder)
    good = sum(row.good for row in rows)
    print(f"{good} of {len(rows)} as promised; in {arguments.out}")
    return 0 if good == len(rows) else 1


def write_result(path: Path, rows: Sequence[Row], slurm: str, folder: str) -> None:
    """Writes the result after every event, in the place of older rows of the same name."""
    found = {row.event: asdict(row) | {"good": row.good} for row in rows}
    old = {row["event"]: row for row in read_json(path)["rows"]} if path.exists() else {}
    known: dict[str, dict[str, Any]] = old | found
    result = {
        "command": "python -m tests.slurm.events",
        "slurm": slurm,
        "nodes": NODES,
        "config": RUN,
        **origin(),
        "rows": list(known.values()),
    }
    path.write_text(json.dumps(result, indent=1).replace(folder, "/tmp/slurm-events") + "\n")


if __name__ == "__main__":
    sys.exit(main())
