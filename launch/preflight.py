"""Checks the nodes of a job before a long run, and names the bad ones. Started by srun, once per node:

srun --ntasks-per-node=1 python launch/preflight.py --nodes node1 node2 --port 29400 --output runs/mine

Each node imports what a run imports, computes on every accelerator and writes where the run will write. Then the
nodes check that they share this folder, and that collectives pass between all hosts (by gloo) and between all ranks.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

try:
    from loraprune_ds.command import Parser, leave
    from loraprune_ds.errors import UserError, one_line, require
except ModuleNotFoundError as missing:
    sys.exit(f"error: {sys.executable} on {os.uname().nodename} has no {missing.name}; see slurm/site.sh")

MOST_SECONDS = 86_400
VERDICT_READ_WITHIN = 5.0  # seconds that the first node stays for the others to read the verdict
VISIBLE_WITHIN = 15.0  # seconds until the others must see a file that one node has written


class Unfit(Exception):
    """Says what is wrong with this node."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--nodes", required=True, nargs="+", metavar="NAME", help="all, in Slurm's order")
    parser.add_argument("--port", required=True, type=int, help="free on the first node")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the run; need not exist")
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="accelerators that will be used")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for all nodes to answer")
    given = parser.parse_args()
    require(0 < given.port < 1 << 16, f"--port must be between 1 and 65535; got {given.port}")
    require(given.ranks_per_node >= 1, f"--ranks-per-node must be at least 1; got {given.ranks_per_node}")
    in_range = 1 <= given.timeout < MOST_SECONDS
    require(in_range, f"--timeout must be at least 1 second and below {MOST_SECONDS}; got {given.timeout:g}")
    return given


def main() -> int:
    """Returns the exit code: 0 if all nodes are fit, 1 if one is not, 2 for unusable arguments."""
    try:
        arguments = parse_arguments()
    except UserError as error:
        print(f"preflight: error: {error}", file=sys.stderr)
        return error.exit_code
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reports every wait in many lines
    index = int(os.environ.get("SLURM_NODEID", "0"))
    try:
        check_imports()
        rendezvous = Rendezvous(arguments.nodes, index, arguments.port, arguments.timeout)
    except Unfit as problem:
        tell(arguments.nodes[index], str(problem))  # the other nodes cannot learn of it
        return 1
    fit = check_together(rendezvous, arguments.ranks_per_node, arguments.output)
    if fit and index == 0:
        print(f"preflight: all {len(arguments.nodes)} nodes are fit", flush=True)
    return 0 if fit else 1


def check_together(rendezvous: "Rendezvous", ranks_per_node: int, output: Path) -> bool:
    """Makes one check after the other on all nodes, until a node fails one."""
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
    print(f"preflight: {node}: {problem}", file=sys.stderr, flush=True)


class Rendezvous:
    """Holds the store on the first node, in which the nodes report to each other."""

    def __init__(self, nodes: list[str], index: int, port: int, timeout: float) -> None:
        """Opens the store, or raises Unfit if the first node cannot be reached or its port is taken."""
        from torch.distributed import (
            DistError,
            TCPStore,  # pyright: ignore[reportPrivateImportUsage]
        )

        self.nodes, self.index, self.port, self.timeout = nodes, index, port, timeout
        try:
            self.store = TCPStore(
                nodes[0], port, is_master=index == 0, timeout=timedelta(seconds=timeout), wait_for_workers=False
            )
        except DistError as error:
            raise Unfit(f"cannot meet the others at {nodes[0]}:{port}: {str(error).splitlines()[0]}") from None

    def agree(self, stage: str, check: Callable[[], None]) -> bool:
        """Returns True if every node passes `check`. The first node names those that do not. All nodes must call it."""
        problem = ""
        try:
            check()
        except (Unfit, OSError, RuntimeError) as error:
            problem = one_line(error)
        self.store.set(f"{stage} {self.index}", problem)
        if self.index > 0:
            verdict = self._read(f"{stage} all", 2 * self.timeout)  # the first node itself waits once that long
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
        """Reads what another node has set; None if it comes too late or the store is gone."""
        from torch.distributed import DistError

        try:
            self.store.wait([key], timedelta(seconds=max(0.1, seconds)))
            return self.store.get(key).decode()
        except DistError:
            return None


def check_imports() -> None:
    """Imports what launch/run.py imports before its ranks meet."""
    try:
        import loraprune_ds.train.run  # noqa: F401
    except ImportError as error:
        raise Unfit(f"{sys.executable}: {error}") from None


def check_accelerators(ranks: int) -> None:
    """Computes a small product on every accelerator that a rank will use."""
    import torch

    from loraprune_ds.zero.device import accelerator, is_cpu

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
    """Checks that this node sees what the first one has written, since output_dir has to be shared."""
    deadline = time.monotonic() + VISIBLE_WITHIN
    while not probe.exists():
        if time.monotonic() > deadline:
            raise Unfit(f"output_dir is not shared: it has no {probe}, which {first_node} has written")
        time.sleep(0.5)


def check_ranks(rendezvous: Rendezvous, ranks_per_node: int) -> None:
    """Runs a sum and an all-to-all over one process per accelerator. The first node prints how fast they were."""
    from loraprune_ds.zero.device import accelerator
    from loraprune_ds.zero.probe import Probe, probe_node

    backend, nodes = accelerator().communication_backend_name(), len(rendezvous.nodes)
    host, index = rendezvous.nodes[0], rendezvous.index
    probe = Probe(host, rendezvous.port, backend, index, nodes, ranks_per_node, rendezvous.timeout)
    speed = probe_node(probe)
    if index == 0 and probe.world_size > 1:
        print(f"preflight: all-to-all over {probe.world_size} ranks by {backend}: {speed:.3g} GB/s to the slowest")


def check_hosts(rendezvous: Rendezvous) -> None:
    """Adds up one number per node by gloo, which ranks use to wait for another rank's download."""
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    from loraprune_ds.command import gloo_interface

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
        hint = "GLOO_SOCKET_IFNAME must name the network interface that does"
        raise Unfit(f"gloo does not reach the other nodes, {hint}: {one_line(error)}") from None


if __name__ == "__main__":
    leave(main())
