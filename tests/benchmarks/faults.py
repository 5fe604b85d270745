"""The fault table: runs under the real launcher are killed, stopped and robbed of their disk, then taken up again.

    python -m tests.benchmarks.faults [--random 20] [--only REGEX] [--missing] [--most N] [--jobs 1] [--out FILE]

For every fault: where it struck, steps lost, seconds until no process of the job was left, and whether the resumed run
ends with the same kept_groups.json, byte for byte, as the run that nothing happened to. Exit code 1 unless all do.
A tiny model on two CPU ranks, without the launcher where nothing happens to them, which halves the time; the disk of
its own for the full-disk case needs root.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint import files
from loraprune_ds.errors import UserError
from loraprune_ds.train import provenance
from loraprune_ds.train.provenance import hardware, versions
from tests.integration.launching import fork_ranks
from tests.integration.resuming import write_run

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results" / "faults.json"
STEPS, EVERY, RANKS = 12, 3, 2
CONFIG: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 1},
    "prune": {"prune_every": 3},
    "checkpoint": {"every": EVERY, "keep_last": 2},
    "evaluate": {"max_windows": 4},
    "logging": {"progress": True},
}
DEADLINE = 600.0  # seconds for one run, on a machine that does much else
GONE = 60.0  # seconds in which a job must be gone: the promise


@dataclass
class Job:
    """A run under the launcher, in a session of its own."""

    out: Path
    log: Path
    process: subprocess.Popen[bytes]
    folder: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> dict[int, str]:
        """All live processes of the session, launcher first: process id -> command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return dict(sorted(found.items()))

    def find(self, word: str) -> int:
        return next(pid for pid, command in self.members().items() if word in command)

    def rank(self, rank: int) -> int:
        return self.find(f"launch/run.py --local_rank={rank}")

    def step(self) -> int:
        """The last step in metrics.jsonl; -1 before the first record."""
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step() >= step)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > deadline or not self.members():
                raise TimeoutError(f"not reached: {self.text()[-2000:]}")
            time.sleep(0.02)

    def seconds_until_gone(self) -> float:
        began = time.monotonic()
        while self.members():
            if time.monotonic() - began > DEADLINE:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise TimeoutError(f"still there: {self.members()}\n{self.text()[-2000:]}")
            self.process.poll()
            time.sleep(0.05)
        return time.monotonic() - began


Strike = Callable[[Job], None]


@dataclass(frozen=True)
class Fault:
    """`point`: a fail-point (faults.py in the package); otherwise `strike` acts on the running job."""

    name: str
    point: str | None = None
    strike: Strike | None = None
    after: Strike | None = None  # before it is taken up again
    disk: bool = False
    expected_codes: tuple[int, ...] = ()  # of the launcher; none: not looked at
    line: str = ""  # what the log must say


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
    commit: str | None = field(default_factory=lambda: provenance.commit(ROOT))
    said: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.hit and self.same_result and self.problem is None and 0 <= self.seconds_until_gone <= GONE


def start(folder: Path, out: Path, point: str | None) -> Job:
    log = folder / "first.log"
    python = Path(sys.executable).parent
    command = [str(python / "deepspeed"), "--quiet", f"--num_accelerators={RANKS}", f"--master_port={free_port()}"]
    command += ["launch/run.py", "--config", str(folder.parent / "config.yaml"), "--set", f"output_dir={out}"]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python}:{os.environ['PATH']}",
    }
    if point is not None:
        environment["LORAPRUNE_FAULT"] = point
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    return Job(out, log, process, folder)


def run_to_end(folder: Path, out: Path, *more: str) -> None:
    """The same run, undisturbed.

    Raises:
        UserError: it ends with another code than 0.
    """
    arguments = ["--config", str(folder.parent / "config.yaml"), "--set", f"output_dir={out}", *more]
    ended = fork_ranks(arguments, folder, ranks=RANKS, timeout=DEADLINE)
    if any(rank.code for rank in ended):
        raise UserError(f"codes {[rank.code for rank in ended]}: {' '.join(rank.err[-300:] for rank in ended)}")


_port = random.Random(os.getpid()).randrange(20_000, 30_000)


def free_port() -> int:
    global _port
    _port += 1
    return _port


def carry_out(fault: Fault, root: Path, expected: bytes) -> Row:
    """The run with its fault, then the resumed one."""
    row = Row(fault.name)
    folder = root / re.sub(r"\W+", "-", fault.name)
    folder.mkdir()
    out = folder / "disk" / "out" if fault.disk else folder / "out"
    if fault.disk:
        mount_small_disk(out.parent)
    try:
        _strike(fault, row, folder, out)
        _resume(row, folder, out, expected)
    except (TimeoutError, StopIteration, OSError, UserError, AssertionError) as error:
        row.problem = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
    finally:
        if fault.disk:
            subprocess.run(["umount", str(out.parent)], check=True)
    print(f"{'ok  ' if row.good else 'FAIL'} {format_row(row)}", flush=True)
    return row


def _strike(fault: Fault, row: Row, folder: Path, out: Path) -> None:
    job = start(folder, out, fault.point)
    if fault.point is not None:
        job.wait_until(lambda: "fail-point" in job.text())
        row.hit = f"fail-point {fault.point.split(':')[0]}:" in job.text()
    elif fault.strike is not None:
        fault.strike(job)
        row.hit = True
    row.seconds_until_gone = round(job.seconds_until_gone(), 1)
    row.exit_code = job.process.wait()
    row.step_reached = job.step()
    row.status = json.loads((out / "status.json").read_text())["state"]
    said = job.text().replace(str(folder.parent), "faults").replace(sys.prefix, ".venv")
    row.said = [line[-200:] for line in said.splitlines() if re.search(r"^error|gone|fail-point|return code", line)]
    if fault.after is not None:
        fault.after(job)
    if fault.expected_codes and row.exit_code not in fault.expected_codes:
        row.problem = f"exit code {row.exit_code}, not {fault.expected_codes}"
    if fault.line not in job.text():
        row.problem = f"the log does not say {fault.line!r}"


def _resume(row: Row, folder: Path, out: Path, expected: bytes) -> None:
    row.resumed_at = newest_good(out)
    row.steps_lost = row.step_reached - (row.resumed_at or 0)
    run_to_end(folder, out, "--resume", "auto")
    row.same_result = (out / "kept_groups.json").read_bytes() == expected
    steps = [line["step"] for line in map(json.loads, (out / "metrics.jsonl").open()) if line["kind"] == "step"]
    if steps != list(range(1, STEPS + 1)):
        row.problem = f"metrics.jsonl has the steps {steps}"
    if row.steps_lost > EVERY:
        row.problem = f"{row.steps_lost} steps lost"


def newest_good(out: Path) -> int | None:
    for step in reversed(files.numbered(out / "checkpoints", "step")):
        try:
            files.verify(files.step_folder(out / "checkpoints", step))
        except UserError:
            continue
        return step
    return None


def mount_small_disk(folder: Path) -> None:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)


# What is done to a running job.


def at_step(step: int, act: Strike) -> Strike:
    def strike(job: Job) -> None:
        job.wait_for_step(step)
        act(job)

    return strike


def kill(word: str, number: int) -> Strike:
    return lambda job: os.kill(job.find(word), number)


def touch_stop(job: Job) -> None:
    (job.out / "STOP").touch()


def fill_disk(job: Job) -> None:
    """Leaves room for a few lines, not for a checkpoint."""
    free = shutil.disk_usage(job.out).free
    (job.out.parent / "filler").write_bytes(bytes(free - 24_000))


def free_disk(job: Job) -> None:
    (job.out.parent / "filler").unlink()


def interrupt_twice(job: Job) -> None:
    """As a terminal does it: to every process; the second after the launcher's echo of the first."""
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(1.5)
    if job.members():
        os.killpg(job.process.pid, signal.SIGINT)


def damage_newest(change: Callable[[bytes], bytes]) -> Strike:
    def damage(job: Job) -> None:
        root = job.out / "checkpoints"
        path = files.step_folder(root, files.numbered(root, "step")[-1]) / files.layer_file(1)
        path.write_bytes(change(path.read_bytes()))

    return damage


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def random_kill(seed: int) -> Fault:
    draw = random.Random(seed)
    rank, step, delay = draw.randrange(RANKS), draw.randrange(0, STEPS), draw.uniform(0, 1.5)

    def strike(job: Job) -> None:
        job.wait_for_step(step)
        time.sleep(delay)
        os.kill(job.rank(rank), signal.SIGKILL)

    return Fault(f"random moment {seed}: SIGKILL of rank {rank}, {delay:.2f} s after step {step}", strike=strike)


def fault_table(random_moments: int) -> list[Fault]:
    kills = [
        ("forward", "forward@14:1"),
        ("backward", "backward@15:0"),
        ("scoring", "scoring@8:1"),
        ("cut, agreed on", "cut.agreed@2:0"),
        ("cut, between layers", "cut.layer@5:1"),
        ("cut, before the engine is refreshed", "cut.rebuilt@2:0"),
        ("save, a layer of a step written", "save.layer@5:1"),
        ("save, a shape written", "save.shape_written@2:1"),
        ("save, before a shape's rename", "save.shape_before_rename@2:0"),
        ("save, after a shape's rename", "save.shape_after_rename@2:0"),
        ("save, a step written", "save.step_written@2:1"),
        ("save, before a step's rename", "save.step_before_rename@2:0"),
        ("save, after a step's rename", "save.step_after_rename@2:0"),
        ("save, an old folder renamed and not yet removed", "save.remove_renamed@1:0"),
        ("save, an old step removed", "save.dropped@1:0"),
        ("finish, before model/ has its name", "finish.before_rename@1:0"),
        ("finish, after model/ has its name", "finish.after_rename@1:0"),
        ("finish, the report written", "finish.reported@1:0"),
    ]
    terms = [
        ("forward", "forward@14:1"),
        ("backward", "backward@15:0"),
        ("scoring", "scoring@8:1"),
        ("cut", "cut.layer@5:1"),
        ("save", "save.layer@5:1"),
    ]
    asked_too_late = Fault("SIGTERM: finish, which is short", "finish.before_rename@1:0:15", expected_codes=(0,))
    stopped = "stopped at step"
    rank_0 = "--local_rank=0"
    launcher, runner = "deepspeed.launcher.launch", "bin/deepspeed"
    return [
        *(Fault(f"SIGKILL: {name}", f"{point}:9", expected_codes=(1, 247, 0)) for name, point in kills),
        *(Fault(f"SIGTERM: {name}", f"{point}:15", expected_codes=(85,), line=stopped) for name, point in terms),
        asked_too_late,
        Fault("stop file", strike=at_step(4, touch_stop), expected_codes=(85,), line=stopped),
        Fault("deepspeed runner: SIGKILL", strike=at_step(4, kill(runner, signal.SIGKILL)), line=stopped),
        Fault("deepspeed runner: SIGTERM", strike=at_step(4, kill(runner, signal.SIGTERM)), line=stopped),
        Fault("launch.py: SIGKILL", strike=at_step(4, kill(f"-m {launcher}", signal.SIGKILL)), line=stopped),
        Fault("launch.py: SIGTERM", strike=at_step(4, kill(f"-m {launcher}", signal.SIGTERM)), line=stopped),
        Fault("SIGINT twice to all", strike=at_step(4, interrupt_twice)),
        Fault("one rank: SIGTERM", strike=at_step(4, kill(rank_0, signal.SIGTERM)), line=stopped),
        Fault(
            "disk full while saving",
            strike=at_step(4, fill_disk),
            after=free_disk,
            disk=True,
            expected_codes=(1,),
            line="No space left on device",
        ),
        Fault(
            "newest checkpoint: a file truncated", strike=at_step(6, touch_stop), after=damage_newest(lambda c: c[:-9])
        ),
        Fault("newest checkpoint: a bit flipped", strike=at_step(6, touch_stop), after=damage_newest(flip_bit)),
        *(random_kill(seed) for seed in range(random_moments)),
    ]


def format_row(row: Row) -> str:
    lost = f"{row.step_reached:>3} {row.resumed_at!s:>5} {row.steps_lost:>5}"
    return (
        f"{row.fault:<62} {lost} {row.seconds_until_gone:>6} {row.exit_code!s:>5} {row.status!s:<9} {row.problem or ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=20, help="kills at random moments, seeded")
    parser.add_argument("--only", default="", help="faults whose name this regular expression finds")
    parser.add_argument("--missing", action="store_true", help="only those that FILE has no good row of; keep the rest")
    parser.add_argument("--most", type=int, help="stop after so many; --missing goes on from there")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; 2 ranks each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    table = fault_table(arguments.random)
    kept = [row for row in read_rows(arguments.out) if row.good] if arguments.missing else []
    kept = [row for row in kept if row.fault in {fault.name for fault in table}]
    done = {row.fault for row in kept}
    faults = [f for f in table if re.search(arguments.only, f.name) and f.name not in done][: arguments.most]
    skipped = []
    if os.geteuid() != 0:
        skipped = [{"fault": fault.name, "why": "mounting a small tmpfs needs root"} for fault in faults if fault.disk]
        faults = [fault for fault in faults if not fault.disk]
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        root = Path(name)
        config = write_run(root, **CONFIG)
        straight = root / "straight"
        straight.mkdir()
        run_to_end(straight, straight / "out")
        expected = (straight / "out" / "kept_groups.json").read_bytes()
        print(f"{'':4} {'fault':<62} at resumed  lost   gone  code status")
        facts = {
            "command": "python -m tests.benchmarks.faults",  # the rows say at which commit they were found
            "config": config.read_text(),
            "ranks": RANKS,
            "checkpoint_every": EVERY,
            "versions": versions(),
            "hardware": hardware("cpu"),
            "skipped": skipped,
        }
        order = {fault.name: i for i, fault in enumerate(table)}
        rows: list[Row] = []
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for row in pool.map(lambda fault: carry_out(fault, root, expected), faults):
                rows.append(row)
                write_result(arguments.out, facts, sorted([*kept, *rows], key=lambda r: order[r.fault]), root)
    good = sum(row.good for row in rows)
    print(f"{good} of {len(rows)} as promised; in {arguments.out}")
    return 0 if good == len(rows) else 1


def read_rows(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def write_result(path: Path, facts: dict[str, Any], rows: list[Row], root: Path) -> None:
    """After every fault: what an interrupted command has found is not lost."""
    result = facts | {"good": sum(row.good for row in rows), "of": len(rows), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1).replace(str(root), "faults") + "\n")


if __name__ == "__main__":
    sys.exit(main())
