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
from tests.slurm.cluster import FOR_GOOD, ROOT, Job, obstacle, running_cluster
from tests.slurm.lab import EVENTS, PATIENCE, RUN, Lab, Row, carry_out, event, said
from tests.support.finished_runs import snapshot
from tests.support.launching import read_json

NODES = 3  # one more than a job takes, for the one that is lost
SAVED = 5  # a step after which a checkpoint is there


event("2 nodes, 1 rank each")(lambda lab, row: lab.finish(row, lab.submit("plain"), "plain"))
event("2 nodes, 2 ranks each")(
    lambda lab, row: lab.finish(row, lab.submit("two", RANKS_PER_NODE="2"), "two", 4)
)


@event("2 nodes, 2 ranks each, hpZ over the node")
def run_with_hpz(lab: Lab, row: Row) -> None:
    """Hierarchical partitioning keeps a copy of the weights on each node. It must not change the cut."""
    settings = read_json(ROOT / "ds_configs" / "zero3.json")
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2
    change = deepspeed(lab, "hpz.json", settings)
    lab.finish(row, lab.submit("hpz", change, RANKS_PER_NODE="2"), "hpz", 4)


@event("2 nodes, 2 ranks each, MiCS", expected="FAILED")
def refuse_mics(lab: Lab, row: Row) -> None:
    change = deepspeed(lab, "mics.json", {"zero_optimization": {"stage": 3, "mics_shard_size": 2}})
    job = lab.submit("mics", change, RANKS_PER_NODE="2")
    lab.finish(row, job, "mics")
    row.remarks = said(job.log(), "mics_shard_size")
    assert row.remarks, job.log()


def deepspeed(lab: Lab, name: str, content: dict[str, Any]) -> str:
    (lab.folder / name).write_text(json.dumps(content))
    return f"deepspeed={lab.folder / name}"


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


# Slurm now and then takes another node for down as well, for a moment. The first has rank 0 and the batch script.
event("node lost", expected_restarts=(1, 2))(partial(lose, out="lost", which=1))
event("first node lost", expected_restarts=(1, 2))(partial(lose, out="lost-first", which=0))


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


@event("rank killed, REQUEUE_FAILED=1", expected_restarts=(1,))
def kill_rank_of_patient_job(lab: Lab, row: Row) -> None:
    """With REQUEUE_FAILED it is requeued by itself."""
    job = started(lab, "failed", SAVED, REQUEUE_FAILED="1")
    os.kill(lab.rank_process("failed", nodes_of(lab, job)[1]), signal.SIGKILL)
    job.wait_until(lambda: job.restarts == 1, "requeued", PATIENCE)
    lab.finish(row, job, "failed")
    row.remarks = said(job.log(), "a rank failed")


@event("scontrol requeue", expected_restarts=(1,))
def requeue_from_outside(lab: Lab, row: Row) -> None:
    job = started(lab, "requeued", 2)
    requeue(lab, job, 1)
    lab.finish(row, job, "requeued")


@event("finished, then scontrol requeue", expected_restarts=(1,))
def requeue_finished(lab: Lab, row: Row) -> None:
    job = lab.submit("plain")  # finished by an event before, or by this one
    assert job.wait_for_end(PATIENCE) == "COMPLETED", job.log()
    before = snapshot(lab.folder / "plain")
    requeue(lab, job, 1)
    lab.finish(row, job, "plain")
    if snapshot(lab.folder / "plain") != before:
        row.problem = "output_dir has changed"


@event("requeued more often than MAX_RESTARTS", expected="FAILED", expected_restarts=(1,))
def restart_too_often(lab: Lab, row: Row) -> None:
    job = lab.submit("given-up", MAX_RESTARTS="0")
    job.wait_until(lambda: "given-up" in job.log(), "started", PATIENCE)
    requeue(lab, job, 1)
    lab.finish(row, job, "given-up")
    row.remarks = said(job.log(), "MAX_RESTARTS")
    assert row.remarks


@event("a node with another file system", expected="FAILED")
def meet_bad_node(lab: Lab, row: Row) -> None:
    """Puts the place of output_dir on another file system on one node."""
    shared = lab.folder / "shared"
    shared.mkdir()
    on_node = ["srun", "--quiet", "--nodelist=node2"]
    lab.cluster.execute(*on_node, "mount", "-t", "tmpfs", "tmpfs", shared)
    try:
        job = lab.submit("shared/run", options=["--nodelist=node1,node2"])
        lab.finish(row, job, "shared/run")
    finally:
        lab.cluster.execute(*on_node, "umount", shared)
    row.remarks = said(job.log(), "preflight:")
    assert any(
        line.startswith("preflight: node2: output_dir is not shared") for line in row.remarks
    ), job.log()


@event("srun, one process per rank, 2 x 2")
def start_by_srun(lab: Lab, row: Row) -> None:
    """Starts one process per rank from the login node, without a launcher."""
    out = lab.folder / "srun"
    command = [
        "srun",
        "--nodes=2",
        "--ntasks-per-node=2",
        "--kill-on-bad-exit=1",
        sys.executable,
        "launch/run.py",
    ]
    run_on_login_node(lab, row, out, command, 4)


@event("deepspeed --hostfile over pdsh")
def start_by_pdsh(lab: Lab, row: Row) -> None:
    """DeepSpeed's own way over ssh, without Slurm."""
    out = lab.folder / "pdsh"
    hostfile = lab.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    exported = {
        name: lab.cluster.environment[name]
        for name in ("DS_ACCELERATOR", "OMP_NUM_THREADS", "PATH")
    }
    environment = lab.folder / "deepspeed_env"
    environment.write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
    command = [
        "env",
        f"DS_ENV_FILE={environment}",
        "deepspeed",
        "--hostfile",
        str(hostfile),
        "launch/run.py",
    ]
    log = run_on_login_node(lab, row, out, command, 2)
    # whose machine it was says nothing
    row.remarks = log.replace(str(ROOT), "CHECKOUT").splitlines()


def run_on_login_node(lab: Lab, row: Row, out: Path, command: Sequence[str], ranks: int) -> str:
    arguments = ["--config", str(lab.config), "--set", f"output_dir={out}"]
    log = lab.cluster.execute(*command, *arguments, cwd=ROOT, timeout=PATIENCE)
    row.state = "COMPLETED"
    lab.compare(row, out, ranks)
    return log


def sweep(lab: Lab, row: Row, out: str, array: str) -> None:
    """Runs three ratios on a node each. Each leaves its own result."""
    options = ("--nodes=1", f"--array={array}")
    arguments = (lab.config, "--set", f"output_dir={lab.folder / out}")
    number = lab.cluster.submit("sweep.sbatch", *arguments, options=options).number
    tasks = {ratio: Job(lab.cluster, f"{number}_{ratio}") for ratio in (20, 35, 50)}
    states = {ratio: job.wait_for_end(PATIENCE) for ratio, job in tasks.items()}
    assert set(states.values()) == {"COMPLETED"}, "\n".join(job.log() for job in tasks.values())
    row.state, row.same_groups = "COMPLETED", True
    for ratio in tasks:
        folder = lab.folder / f"{out}-ratio-0.{ratio}"
        found = (folder / "kept_groups.json").read_bytes()
        row.same_groups = row.same_groups and found == lab.straight(1, f"prune.ratio=0.{ratio}")
        report = read_json(folder / "report.json")
        row.remarks.append(f"ratio 0.{ratio}: perplexity {report['perplexity']['pruned']:.2f}")


event("sweep of three ratios, at once")(partial(sweep, out="parallel", array="20,35,50"))
event("sweep of three ratios, one after the other")(
    partial(sweep, out="serial", array="20,35,50%1")
)


@event("evaluate.sbatch on 2 nodes")
def evaluate(lab: Lab, row: Row) -> None:
    """The dense model, spread over two nodes."""
    arguments = (
        lab.folder / "source",
        "--text",
        lab.folder / "text.txt",
        "--window",
        "24",
        "--max-windows",
        "4",
    )
    job = lab.cluster.submit("evaluate.sbatch", *arguments, options=("--nodes=2",))
    row.state = job.wait_for_end(PATIENCE)
    row.remarks = said(job.log(), "perplexity")
    assert row.remarks, job.log()


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
        "rows": [known[name] for name in EVENTS if name in known],
    }
    path.write_text(json.dumps(result, indent=1).replace(folder, "/tmp/slurm-events") + "\n")


if __name__ == "__main__":
    sys.exit(main())
