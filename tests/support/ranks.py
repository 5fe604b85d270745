"""Real DeepSpeed ranks for tests: worker processes that stay alive from test to test, one set per world size.

Ranks meet through a file store, not a port. A failure, a dead rank or a missed deadline ends the set, because ranks
left in the middle of a collective cannot be trusted with another test.
"""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext, ForkServerContext
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")
# Collectives of this package by their names since torch 2.13, and before. DeepSpeed calls the older.
RENAMED = {"all_gather_single": "all_gather_into_tensor"}
Setup = Callable[[int, int, Path], None]  # (rank, world_size, folder the ranks of this set share)

# What most processes of the tests import. A server that has it forks each of them in a moment.
PRELOADED = ["torch", "deepspeed", "peft", "transformers", "datasets", "loraprune_ds.train.run"]
PRELOADED += ["tests.support.driver", "tests.support.launching"]
START_TIMEOUT = 120.0  # the server's imports take 5 s on an idle core
CAUSE_GRACE = 1.0  # after a failure is seen, how long an earlier one may still be on its way
STACK_GRACE = 1.0  # for ranks that missed the deadline to write down where they stand


def forking() -> ForkServerContext:
    """Returns the context of processes that have the imports."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # which DeepSpeed reads at import
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class RankFailure(Exception):
    """What went wrong on the rank that failed first, or where every rank stood at the deadline."""


def start_deepspeed(rank: int, world_size: int, folder: Path) -> None:
    """Makes this process a rank: torch.distributed and deepspeed.comm over gloo."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),  # zero.Init reads it
        "WORLD_SIZE": str(world_size),
        # DeepSpeed asks for both, but the ranks meet in a file.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # a machine's own name need not resolve
    }
    import deepspeed  # only here: most of this file's users start no rank
    import torch

    torch.set_num_threads(1)
    deepspeed.utils.logger.setLevel("ERROR")
    # As zero/engine.py does it. A build that a killed worker leaves behind would lock the cache of all checkouts.
    deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    place: Any = {
        "init_method": f"file://{folder / 'store'}",
        "rank": rank,
        "world_size": world_size,
    }
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, **place)
    from loraprune_ds.report import report

    # Pictures take a quarter of a tiny run. Runs that a launcher starts draw them.
    report.can_show = lambda package: False


class RankPool:
    """Runs functions on `world_size` ranks at the same time.

    `fresh`: `setup` comes before all imports.
    """

    def __init__(self, setup: Setup = start_deepspeed, *, fresh: bool = False) -> None:
        self._setup = setup
        self._context = multiprocessing.get_context("spawn") if fresh else forking()
        self._sets: dict[int, _RankSet] = {}

    def run(
        self, world_size: int, function: Callable[..., T], *args: Any, timeout: float = 180
    ) -> list[T]:
        """Calls `function(*args)`, a top-level function, on every rank, and returns the values in rank order.

        Raises:
            RankFailure: the traceback or signal of the first rank that failed, or where every rank stood at `timeout`.
        """
        __tracebackhide__ = True  # pytest then ends at the test's own line
        # Plain pickle copies tensors; multiprocessing's own would share their memory with a worker that may die.
        job = pickle.dumps((function, args))
        try:
            if world_size not in self._sets:
                self._sets[world_size] = _RankSet(world_size, self._setup, self._context)
                self._sets[world_size].collect(START_TIMEOUT)
            return self._sets[world_size].run(job, timeout)
        except BaseException:
            self._drop(world_size)
            raise

    def close(self) -> None:
        for world_size in list(self._sets):
            self._drop(world_size)

    def _drop(self, world_size: int) -> None:
        if world_size in self._sets:
            self._sets.pop(world_size).kill()


@dataclass(frozen=True)
class _Failure:
    rank: int
    time: float  # monotonic, which all processes of a machine share
    report: str
    died: bool = False  # without raising: by a signal or os._exit


class _Worker:
    """The pool's end of one rank."""

    def __init__(
        self, rank: int, world_size: int, folder: Path, setup: Setup, context: Any
    ) -> None:
        self.rank = rank
        self.stack = folder / f"stack-{rank}"
        self.connection, theirs = context.Pipe()
        arguments = (theirs, self.stack, setup, (rank, world_size, folder))
        self.process = context.Process(
            target=_serve, args=arguments, name=f"rank-{rank}", daemon=True
        )
        self.process.start()
        theirs.close()  # the end of the worker is then the end of the pipe

    def send(self, job: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker is reported by `receive`
            self.connection.send_bytes(job)

    def receive(self) -> Any:
        try:
            return pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            report = f"{_how_it_ended(self.process.exitcode)}\n{self.read_stack()}"
            return _Failure(self.rank, time.monotonic(), report, died=True)

    def ask_where(self) -> None:
        """Makes the worker write down its Python stack, even deep inside a collective."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, signal.SIGUSR1)

    def read_stack(self) -> str:
        return self.stack.read_text() if self.stack.exists() else ""


class _RankSet:
    """The workers of one world size."""

    def __init__(self, world_size: int, setup: Setup, context: BaseContext) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        shared = world_size, Path(self._folder.name), setup, context
        self.workers = [_Worker(rank, *shared) for rank in range(world_size)]

    def run(self, job: bytes, timeout: float) -> list[Any]:
        __tracebackhide__ = True
        for worker in self.workers:
            worker.send(job)
        return self.collect(timeout)

    def collect(self, timeout: float) -> list[Any]:
        __tracebackhide__ = True
        waiting = {worker.connection: worker for worker in self.workers}
        answers: dict[int, Any] = {}
        for rank, answer in _arrivals(waiting, timeout):
            if isinstance(answer, _Failure):
                others = [
                    other
                    for _, other in _arrivals(waiting, CAUSE_GRACE)
                    if isinstance(other, _Failure)
                ]
                raise RankFailure(self._name_cause([answer, *others]))
            answers[rank] = answer
        if waiting:
            raise RankFailure(f"no end after {timeout:g} s\n{self._where_each_stands(answers)}")
        return [answers[rank] for rank in range(len(self.workers))]

    def kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.connection.close()
        self._folder.cleanup()

    def _name_cause(self, failures: list[_Failure]) -> str:
        # A rank that dies breaks its peers' connections, and their tracebacks may arrive before its death is seen.
        cause = min(failures, key=lambda failure: (not failure.died, failure.time))
        return f"rank {cause.rank} of {len(self.workers)}: {cause.report}"

    def _where_each_stands(self, answers: dict[int, Any]) -> str:
        for worker in self.workers:
            worker.ask_where()
        time.sleep(STACK_GRACE)
        stands = {
            w.rank: "has finished\n" if w.rank in answers else w.read_stack() for w in self.workers
        }
        return "\n".join(
            f"rank {rank} of {len(stands)}: {text or 'gave no answer'}"
            for rank, text in stands.items()
        )


def _arrivals(waiting: dict[Connection, _Worker], timeout: float) -> Iterator[tuple[int, Any]]:
    """Yields ranks and their answers as they come, and removes them from `waiting`, until the time is over."""
    deadline = time.monotonic() + timeout
    while waiting and (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            worker = waiting.pop(cast(Connection, connection))
            yield worker.rank, worker.receive()


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"


def _serve(
    connection: Connection, stack: Path, setup: Setup, setup_arguments: tuple[int, int, Path]
) -> None:
    with stack.open("w") as stack_file:
        faulthandler.enable(stack_file)
        faulthandler.register(signal.SIGUSR1, stack_file)
        rank = setup_arguments[0]
        connection.send_bytes(_answer(rank, setup, setup_arguments))
        gc.freeze()  # DeepSpeed collects garbage twice a cut, and imports left none
        with contextlib.suppress(EOFError):
            while True:
                connection.send_bytes(_answer(rank, _run_job, (connection.recv_bytes(),)))
                gc.collect()  # engines are full of cycles and would pile up


def _run_job(job: bytes) -> Any:
    function, args = pickle.loads(job)
    return function(*args)


def _answer(rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return pickle.dumps(function(*args))
    except BaseException as error:  # noqa: BLE001  # pytest.fail and sys.exit too: whatever stops a rank is a failure
        return pickle.dumps(
            _Failure(rank, time.monotonic(), "".join(traceback.format_exception(error)))
        )
