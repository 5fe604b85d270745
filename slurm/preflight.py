"""Checks the nodes of a job before a long run, and names bad ones. srun starts it once per node:

srun --ntasks-per-node=1 python slurm/preflight.py --nodes node1 node2 --port 29400 --output runs/mine

Each node makes the imports of a run, computes on every accelerator and writes to the folder of the run. Then the nodes
check that they share this folder, and that collectives work between all hosts (by gloo) and between all ranks.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

# torch reports every wait in many lines. It reads this once
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
try:
    import torch
    from torch import distributed
    from torch.distributed import (
        DistError,
        TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    )
    from torch.distributed.distributed_c10d import PrefixStore

    from loraprune_ds.arguments import Parser
    from loraprune_ds.errors import UserError, leave, one_line, require
    from loraprune_ds.ranks.job import gloo_interface
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} on {os.uname().nodename} has no {missing.name}; see slurm/site.sh"
    )
except ImportError as broken:  # a library of torch that does not load, for example
    sys.exit(f"error: {sys.executable} on {os.uname().nodename}: {broken}")

MOST_SECONDS = 86_400
VERDICT_READ_WITHIN = 5.0  # seconds that the first node waits for others to read the verdict
VISIBLE_WITHIN = 15.0  # seconds until the others must see a file that one node has written
# fp32 elements that a rank sends: 256 MiB, or 1 MiB over gloo
GPU_NUMEL, CPU_NUMEL = 1 << 26, 1 << 18
REPEATS = 3


class Unfit(Exception):
    """A problem of this node."""


def check_nodes(
    nodes: list[str], index: int, port: int, timeout: float, ranks_per_node: int, output: Path
) -> bool:
    """Checks this node, `index`, and all nodes together. Returns True if all are fit."""
    try:
        rendezvous = Rendezvous(nodes, index, port, timeout)
    except Unfit as problem:
        tell(nodes[index], str(problem))  # the other nodes cannot see this problem
        return False
    fit = check_together(rendezvous, ranks_per_node, output)
    if fit and index == 0:
        sys.stdout.write(f"preflight: all {len(nodes)} nodes are fit\n")
    return fit


def check_together(rendezvous: "Rendezvous", ranks_per_node: int, output: Path) -> bool:
    """Makes the checks in turn on all nodes, until a node fails."""
    with ExitStack() as open_files:

        def write_probe() -> None:
            probe = open_files.enter_context(probe_file(output))
            rendezvous.store.set(f"probe {rendezvous.index}", str(probe))

        def see_probe() -> None:
            check_visible(Path(rendezvous.store.get("probe 0").decode()), rendezvous.nodes[0])

        return (
            rendezvous.agree("accelerators", lambda: check_accelerators(ranks_per_node))
            and rendezvous.agree("output", write_probe)
            and rendezvous.agree("shared", see_probe)
            and rendezvous.agree("hosts", lambda: check_hosts(rendezvous))
            and rendezvous.agree("ranks", lambda: check_ranks(rendezvous, ranks_per_node))
        )


def tell(node: str, problem: str) -> None:
    sys.stderr.write(f"preflight: {node}: {problem}\n")


class Rendezvous:
    """Holds the store on the first node, in which the nodes report to each other."""

    def __init__(self, nodes: list[str], index: int, port: int, timeout: float) -> None:
        """Opens the store, or raises Unfit if the first node cannot be reached or its port is taken."""
        self.nodes, self.index, self.port, self.timeout = nodes, index, port, timeout
        limit = timedelta(seconds=timeout)
        try:
            self.store = TCPStore(
                nodes[0], port, is_master=index == 0, timeout=limit, wait_for_workers=False
            )
        except DistError as error:
            raise Unfit(
                f"cannot meet the other nodes at {nodes[0]}:{port}: {str(error).splitlines()[0]}"
            ) from None

    def agree(self, stage: str, check: Callable[[], None]) -> bool:
        """Returns True if every node passes `check`. The first node names the others. All nodes must call it."""
        problem = ""
        try:
            check()
        except (Unfit, OSError, RuntimeError) as error:
            problem = one_line(error)
        self.store.set(f"{stage} {self.index}", problem)
        if self.index > 0:
            # the first node itself waits for one timeout
            verdict = self._read(f"{stage} all", 2 * self.timeout)
            if verdict is None:
                tell(self.nodes[self.index], f"{self.nodes[0]} is gone")
            self.store.set(f"{stage} heard {self.index}", "")
            return verdict == "fit"
        deadline = time.monotonic() + self.timeout
        fit = True
        for index, node in enumerate(self.nodes):
            problem = self._read(f"{stage} {index}", deadline - time.monotonic())
            if problem != "":
                fit = False
                tell(node, f"no answer in {self.timeout:g} s" if problem is None else problem)
        self.store.set(f"{stage} all", "fit" if fit else "unfit")
        deadline = time.monotonic() + VERDICT_READ_WITHIN  # the store ends with this node
        for index in range(1, len(self.nodes)):
            self._read(f"{stage} heard {index}", deadline - time.monotonic())
        return fit

    def _read(self, key: str, seconds: float) -> str | None:
        """Reads a value of another node. None if it comes too late or the store is gone."""
        try:
            self.store.wait([key], timedelta(seconds=max(0.1, seconds)))
            return self.store.get(key).decode()
        except DistError:
            return None


def check_accelerators(ranks: int) -> None:
    """Computes a small product on every accelerator that a rank will use."""
    from loraprune_ds.ranks.device import is_cpu

    # not at the top, because spawned ranks need no DeepSpeed
    from loraprune_ds.zero.device import accelerator

    count = 1 if is_cpu() else accelerator().device_count()
    if not is_cpu() and count < ranks:
        raise Unfit(f"{count} accelerators for {ranks} ranks")
    for device in range(count if is_cpu() else ranks):
        ones = torch.ones(64, 64, device=accelerator().device_name(None if is_cpu() else device))
        if (ones @ ones).sum().item() != 64**3:
            raise Unfit(f"{ones.device} computes wrong numbers")


@contextmanager
def probe_file(folder: Path) -> Iterator[Path]:
    """Writes a file into `folder`, or the nearest existing folder above it, and removes it at the end."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with tempfile.NamedTemporaryFile(prefix=".preflight-", dir=existing) as file:
        yield Path(file.name)


def check_visible(probe: Path, first_node: str) -> None:
    """Checks that this node sees the file of the first node, because output_dir must be shared."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not probe.exists():
        if time.monotonic() > deadline:
            raise Unfit(
                f"output_dir is not shared: it has no {probe}, which {first_node} has written"
            )
        time.sleep(0.5)


def check_hosts(rendezvous: Rendezvous) -> None:
    """Adds up one number per node by gloo. Ranks wait by gloo for the download of another rank."""
    os.environ |= gloo_interface(os.environ)
    try:
        distributed.init_process_group(
            "gloo",
            store=PrefixStore("hosts", rendezvous.store),
            rank=rendezvous.index,
            world_size=len(rendezvous.nodes),
            timeout=timedelta(seconds=rendezvous.timeout),
        )
        distributed.all_reduce(torch.ones(1))
        distributed.destroy_process_group()
    except RuntimeError as error:
        hint = "GLOO_SOCKET_IFNAME must name a network interface that does"
        raise Unfit(f"gloo does not reach the other nodes, {hint}: {one_line(error)}") from None


def check_ranks(rendezvous: Rendezvous, ranks_per_node: int, backend: str | None = None) -> None:
    """Runs collectives over one process per accelerator. The first node prints the speed of an all-to-all.

    Raises:
        Unfit: a rank failed or gave no answer. The message names it.
    """
    from loraprune_ds.zero.device import accelerator

    backend = backend or accelerator().communication_backend_name()
    index, world_size = rendezvous.index, len(rendezvous.nodes) * ranks_per_node
    context, deadline = (
        multiprocessing.get_context("spawn"),
        time.monotonic() + 2 * rendezvous.timeout,
    )
    where = (rendezvous.nodes[0], rendezvous.port, rendezvous.timeout)
    connections, processes = [], []
    for local in range(ranks_per_node):
        ours, theirs = context.Pipe(duplex=False)
        rank = index * ranks_per_node + local
        processes.append(
            context.Process(
                target=_be_rank, args=(*where, backend, rank, local, world_size, theirs)
            )
        )
        processes[-1].start()
        theirs.close()  # or the pipe would not end with the rank
        connections.append(ours)
    answers = [_answer(connection, deadline) for connection in connections]
    for process in processes:
        process.kill()
    for rank, answer in enumerate(answers, start=index * ranks_per_node):
        if isinstance(answer, str):
            raise Unfit(f"rank {rank}: {answer}")
    if index == 0 and world_size > 1:
        exchange = f"all-to-all over {world_size} ranks by {backend}"
        sys.stdout.write(
            f"preflight: {exchange}: {cast(float, answers[0]):.3g} GB/s to the slowest\n"
        )


def _answer(connection: Connection, deadline: float) -> float | str:
    try:
        return (
            connection.recv()
            if connection.poll(max(0.0, deadline - time.monotonic()))
            else "no answer"
        )
    except EOFError:
        return "no answer"


def _be_rank(
    host: str,
    port: int,
    timeout: float,
    backend: str,
    rank: int,
    local: int,
    world_size: int,
    answer: Connection,
) -> None:
    """Runs the collectives on one rank. Answers with the speed, or a line about the problem."""
    limit = timedelta(seconds=timeout)
    try:
        device = "cpu" if backend == "gloo" else f"cuda:{local}"
        if backend != "gloo":
            torch.cuda.set_device(local)
        store = PrefixStore("ranks", TCPStore(host, port, is_master=False, timeout=limit))
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=limit
        )
        slowest = _exchange(rank, world_size, device)
        distributed.barrier()
        distributed.destroy_process_group()
        answer.send(slowest)
    except (DistError, RuntimeError, ValueError) as error:
        answer.send(one_line(error))


def _exchange(rank: int, world_size: int, device: str) -> float:
    """Sends a part to every rank and checks the parts that arrive. Returns the GB/s of the slowest rank."""
    number = torch.full((1,), float(rank), device=device)
    distributed.all_reduce(number)
    if number.item() != sum(range(world_size)):
        raise ValueError(f"a sum over all ranks is {number.item():g}")
    numel = (CPU_NUMEL if device == "cpu" else GPU_NUMEL) // world_size
    sent = torch.full((world_size * numel,), float(rank), device=device)
    received = torch.empty_like(sent)
    # connects first, which takes longer than the exchange
    distributed.all_to_all_single(received, sent)
    if received.view(world_size, -1)[:, -1].tolist() != list(range(world_size)):
        raise ValueError("an all-to-all brought wrong numbers")
    distributed.barrier()
    began = time.perf_counter()
    for _ in range(REPEATS):
        distributed.all_to_all_single(received, sent)
    received[-1].item()  # waits for a GPU
    seconds = (time.perf_counter() - began) / REPEATS
    speed = torch.tensor([4e-9 * numel * (world_size - 1) / seconds], device=device)
    distributed.all_reduce(speed, op=distributed.ReduceOp.MIN)
    return speed.item()


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument(
        "--nodes", required=True, nargs="+", metavar="NAME", help="all nodes, in Slurm's order"
    )
    parser.add_argument("--port", required=True, type=int, help="a free port on the first node")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FOLDER", help="output_dir; need not exist"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, default=1, metavar="N", help="accelerators that will be used"
    )
    parser.add_argument(
        "--timeout", type=float, default=300, metavar="SECONDS", help="for all nodes to answer"
    )
    arguments = parser.parse_args()
    require(
        0 < arguments.port < 1 << 16, f"--port must be between 1 and 65535; got {arguments.port}"
    )
    ranks, timeout = arguments.ranks_per_node, arguments.timeout
    require(ranks >= 1, f"--ranks-per-node must be at least 1; got {ranks}")
    in_range = 1 <= timeout < MOST_SECONDS
    require(
        in_range, f"--timeout must be at least 1 second and below {MOST_SECONDS}; got {timeout:g}"
    )
    return arguments


def main() -> int:
    """Returns the exit code: 0 if all nodes are fit, 1 if one is not, 2 for unusable arguments."""
    try:
        arguments = parse_arguments()
    except UserError as error:
        print(f"preflight: error: {error}", file=sys.stderr)
        return error.exit_code
    index = int(os.environ.get("SLURM_NODEID", "0"))
    try:
        import loraprune_ds.train.run  # noqa: F401 (launch/run.py imports this before its ranks meet)
    except ImportError as error:  # the other nodes cannot see this problem
        print(f"preflight: {arguments.nodes[index]}: {sys.executable}: {error}", file=sys.stderr)
        return 1
    fit = check_nodes(
        arguments.nodes,
        index,
        arguments.port,
        arguments.timeout,
        arguments.ranks_per_node,
        arguments.output,
    )
    return 0 if fit else 1


if __name__ == "__main__":
    leave(main())
