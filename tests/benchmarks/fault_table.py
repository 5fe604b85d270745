"""Names the faults of faults.py: the place where a run is struck, and the means."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from loraprune_ds.checkpoint import layout
from loraprune_ds.errors import UserError
from tests.support.launching import fork_ranks
from tests.support.refusals import Spoil, flip_bit

STEPS, RANKS = 12, 2
STOPPED = "stopped at step"
DEADLINE = 600.0  # seconds for one run, on a busy machine


@dataclass
class Job:
    """Holds a run under the launcher, in its own session."""

    out: Path
    log: Path
    process: subprocess.Popen[bytes]
    folder: Path

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> dict[int, str]:
        """Returns all live processes of the session, launcher first: process id -> command line."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    found[int(path.name)] = (
                        (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    )
            except OSError:
                continue
        return dict(sorted(found.items()))

    def find(self, word: str) -> int:
        return next(pid for pid, command in self.members().items() if word in command)

    def rank(self, rank: int) -> int:
        return self.find(f"launch/run.py --local_rank={rank}")

    def step(self) -> int:
        """Returns the last step in metrics.jsonl, or -1 before the first record."""
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
    """Describes one fault: a fail-point of loraprune_ds/errors.py, or else a strike on the running job."""

    name: str
    point: str | None = None
    again: str | None = None  # strikes the run that goes on, too
    strike: Strike | None = None
    after: Strike | None = None  # before it is taken up again
    disk: bool = False
    expected_codes: tuple[int, ...] = ()  # of the launcher; None: not checked
    line: str = ""  # what the log must say
    suite: str = "plain"


def run_to_end(folder: Path, out: Path, *more: str) -> None:
    """Makes the same run, undisturbed."""
    arguments = [
        "--config",
        str(folder.parent / "config.yaml"),
        "--set",
        f"output_dir={out}",
        *more,
    ]
    ended = fork_ranks(arguments, folder, ranks=RANKS, timeout=DEADLINE)
    if any(rank.code for rank in ended):
        raise UserError(
            f"codes {[rank.code for rank in ended]}: {' '.join(rank.err[-300:] for rank in ended)}"
        )


# Strikes on a running job.


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


def empty_disk(job: Job) -> None:
    (job.out.parent / "filler").unlink()


def interrupt_twice(job: Job) -> None:
    """Interrupts every process, as a terminal does. The second signal follows the launcher's echo of the first."""
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(1.5)
    if job.members():
        os.killpg(job.process.pid, signal.SIGINT)


def supersede(job: Job) -> None:
    """Stops the whole job, takes the run over to its end, and wakes the job."""
    os.killpg(job.process.pid, signal.SIGSTOP)
    run_to_end(job.folder, job.out, "--resume", "auto")
    os.killpg(job.process.pid, signal.SIGCONT)


def damage_newest(damage: Spoil) -> Strike:
    def strike(job: Job) -> None:
        root = job.out / "checkpoints"
        damage(
            layout.step_folder(root, layout.numbered(root, "step")[-1])
            / layout.layer_file("lora", 1)
        )

    return strike


def random_kill(seed: int, suite: str = "plain") -> Fault:
    draw = random.Random(seed)
    rank, step, delay = draw.randrange(RANKS), draw.randrange(0, STEPS), draw.uniform(0, 1.5)

    def strike(job: Job) -> None:
        job.wait_for_step(step)
        time.sleep(delay)
        os.kill(job.rank(rank), signal.SIGKILL)

    name = f"random moment {seed}: SIGKILL of rank {rank}, {delay:.2f} s after step {step}"
    return Fault(_named(name, suite), strike=strike, suite=suite)


def _named(name: str, suite: str) -> str:
    return name if suite == "plain" else f"{suite}: {name}"


def fault_table(random_moments: int) -> list[Fault]:
    """Returns all faults. `random` of them strike the plain run at random moments, a fifth as many the `levers` run."""
    callback = [("save, before pruning/ has its name", "save.pruning_before_rename@2:0")]
    callback += [("save, pruning/ written", "save.pruning_written@3:1")]
    others = killed_at(callback, suite="callback")
    return [*plain_faults(random_moments), *lever_faults(random_moments // 5), *others]


def killed_at(
    points: list[tuple[str, str]], suite: str, codes: tuple[int, ...] = ()
) -> list[Fault]:
    """Returns a SIGKILL at each of the fail-points: name, and phase@n:rank."""
    return [
        Fault(_named(f"SIGKILL: {name}", suite), f"{p}:9", expected_codes=codes, suite=suite)
        for name, p in points
    ]


def lever_faults(random_moments: int) -> list[Fault]:
    kills = [
        ("forward that measures inputs", "forward@9:1"),
        ("backward that adds up gradients of masks", "backward@9:0"),
        ("cut, agreed on", "cut.agreed@2:0"),
        ("cut, refitted and not yet shrunk", "cut.compensated@2:1"),
        ("cut, between layers", "cut.layer@5:1"),
        ("save, a layer with its refits written", "save.layer@5:1"),
        ("save, a step written", "save.step_written@2:1"),
        ("save, before a step's rename", "save.step_before_rename@2:0"),
        ("save, after a step's rename", "save.step_after_rename@2:0"),
        ("recovery, forward", "forward@28:0"),
        ("finish, before model/ has its name", "finish.before_rename@1:0"),
    ]
    suite, name = "levers", "levers: SIGTERM: cut, refitted and not yet shrunk"
    stop = Fault(name, "cut.compensated@2:0:15", expected_codes=(85,), line=STOPPED, suite=suite)
    return [
        *killed_at(kills, suite),
        stop,
        *(random_kill(100 + seed, suite) for seed in range(random_moments)),
    ]


def plain_faults(random_moments: int) -> list[Fault]:
    kills = [
        ("forward", "forward@14:1"),
        ("backward", "backward@15:0"),
        ("scoring", "scoring@8:1"),
        ("cut, agreed on", "cut.agreed@2:0"),
        ("cut, between layers", "cut.layer@5:1"),
        ("cut, before the engine is refreshed", "cut.rebuilt@2:0"),
        ("save, a layer of a step written", "save.layer@5:1"),
        ("save, a step written", "save.step_written@2:1"),
        ("save, before a step's rename", "save.step_before_rename@2:0"),
        ("save, after a step's rename", "save.step_after_rename@2:0"),
        ("save, an old folder renamed and not yet removed", "save.remove_renamed@1:0"),
        ("save, an old step removed", "save.dropped@1:0"),
        ("export, before its folder has its name", "export.before_rename@1:0"),
        ("export, after its folder has its name", "export.after_rename@1:0"),
        ("finish, the report written", "finish.reported@1:0"),
        ("finish, before model/ has its name", "finish.before_rename@1:0"),
        ("finish, after model/ has its name", "finish.after_rename@1:0"),
    ]
    twice = [("export, twice", "export.before_rename", "export.after_rename")]
    twice += [("export, then finish", "export.after_rename", "finish.before_rename")]
    terms = [("forward", "forward@14:1"), ("backward", "backward@15:0"), ("scoring", "scoring@8:1")]
    terms += [("cut", "cut.layer@5:1"), ("save", "save.layer@5:1")]
    failed, fills, late = (
        Fault("", expected_codes=(1,)),
        at_step(4, fill_disk),
        at_step(6, touch_stop),
    )
    cut_short = damage_newest(lambda path: path.write_bytes(path.read_bytes()[:-9]))
    taken, full = "another process has taken over this run", "No space left on device"
    raised = "[rank 1] RuntimeError: fail-point backward@15: raised"
    asked_too_late = Fault(
        "SIGTERM: finish, which is short", "finish.before_rename@1:0:15", expected_codes=(0,)
    )
    launchers = [
        ("deepspeed runner", "bin/deepspeed"),
        ("launch.py", "-m deepspeed.launcher.launch"),
    ]
    struck = [
        (*where, number) for where in launchers for number in (signal.SIGKILL, signal.SIGTERM)
    ]
    struck += [("one rank", "--local_rank=0", signal.SIGTERM)]
    return [
        *killed_at(kills, "plain", (1, 247, 0)),
        *(
            Fault(f"SIGKILL: {name}", f"{first}@1:0:9", f"{then}@1:0:9")
            for name, first, then in twice
        ),
        *(
            Fault(f"SIGTERM: {name}", f"{point}:15", expected_codes=(85,), line=STOPPED)
            for name, point in terms
        ),
        asked_too_late,
        Fault("stop file", strike=at_step(4, touch_stop), expected_codes=(85,), line=STOPPED),
        *(
            Fault(f"{name}: {x.name}", strike=at_step(4, kill(word, x)), line=STOPPED)
            for name, word, x in struck
        ),
        replace(
            failed,
            name="one rank: unexpected error in backward",
            point="backward@15:1:raise",
            line=raised,
        ),
        replace(
            failed,
            name="superseded while it stood still, then woken",
            strike=at_step(4, supersede),
            line=taken,
        ),
        Fault("SIGINT twice to all", strike=at_step(4, interrupt_twice)),
        replace(
            failed,
            name="disk full while saving",
            strike=fills,
            after=empty_disk,
            disk=True,
            line=full,
        ),
        Fault("newest checkpoint: a file truncated", strike=late, after=cut_short),
        Fault("newest checkpoint: a bit flipped", strike=late, after=damage_newest(flip_bit)),
        *(random_kill(seed) for seed in range(random_moments)),
    ]
