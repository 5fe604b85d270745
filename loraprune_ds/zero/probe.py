"""Tests the collectives of a run between all ranks of a job, before the run. launch/preflight.py starts it."""

import multiprocessing
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed import (
    DistError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.distributed_c10d import PrefixStore

from loraprune_ds.errors import one_line

GPU_NUMEL, CPU_NUMEL = 1 << 26, 1 << 18  # fp32 elements that a rank sends: 256 MiB, or 1 MiB over gloo
REPEATS = 3
BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Probe:
    """Describes the job whose ranks are tested.

    Attributes:
        host, port: of a store that every rank reaches.
        timeout: seconds for all ranks to answer.
    """

    host: str
    port: int
    backend: str
    node: int
    nodes: int
    ranks_per_node: int
    timeout: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def probe_node(probe: Probe) -> str | None:
    """Starts the ranks of this node and waits for them. Returns what is wrong, or None."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_be_rank, args=(probe, local)) for local in range(probe.ranks_per_node)]
    for process in processes:
        process.start()
    deadline, problem = time.monotonic() + 2 * probe.timeout, None
    store = _store(probe)
    for local, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        rank = probe.node * probe.ranks_per_node + local
        if process.exitcode != 0 and problem is None:
            told = store.get(_problem(rank)).decode() if store.check([_problem(rank)]) else "no answer"
            problem = f"rank {rank}: {told}"
    return problem


def bandwidth(probe: Probe) -> float:
    """Returns the GB/s that the slowest rank received from the others in an all-to-all. Call it after all are done."""
    return float(_store(probe).get(BANDWIDTH))


def _be_rank(probe: Probe, local: int) -> None:
    """Runs the collectives on one rank. Exits with 1 and leaves a line in the store if one of them fails."""
    store, rank = _store(probe), probe.node * probe.ranks_per_node + local
    try:
        device = "cpu" if probe.backend == "gloo" else f"cuda:{local}"
        if probe.backend != "gloo":
            torch.cuda.set_device(local)
        distributed.init_process_group(
            probe.backend,
            store=PrefixStore("ranks", store),
            rank=rank,
            world_size=probe.world_size,
            timeout=timedelta(seconds=probe.timeout),
        )
        slowest = _exchange(rank, probe.world_size, device)
        if rank == 0:
            store.set(BANDWIDTH, str(slowest))
        distributed.barrier()
        distributed.destroy_process_group()
    except (DistError, RuntimeError, ValueError) as error:
        store.set(_problem(rank), one_line(error))
        raise SystemExit(1) from None


def _exchange(rank: int, world_size: int, device: str) -> float:
    """Sends a part to every rank and checks what arrives. Returns the GB/s of the slowest rank.

    Raises:
        ValueError: a sum or a part is wrong.
    """
    number = torch.full((1,), float(rank), device=device)
    distributed.all_reduce(number)
    if number.item() != sum(range(world_size)):
        raise ValueError(f"a sum over all ranks is {number.item():g}")
    numel = (CPU_NUMEL if device == "cpu" else GPU_NUMEL) // world_size
    sent = torch.full((world_size * numel,), float(rank), device=device)
    received = torch.empty_like(sent)
    distributed.all_to_all_single(received, sent)  # connects, which takes longer than all that follow
    if received.view(world_size, -1)[:, -1].tolist() != list(range(world_size)):
        raise ValueError("an all-to-all brought wrong numbers")
    distributed.barrier()
    began = time.perf_counter()
    for _ in range(REPEATS):
        distributed.all_to_all_single(received, sent)
    received[-1].item()  # a GPU is still at work
    seconds = (time.perf_counter() - began) / REPEATS
    speed = torch.tensor([4e-9 * numel * (world_size - 1) / seconds], device=device)
    distributed.all_reduce(speed, op=distributed.ReduceOp.MIN)
    return speed.item()


def _store(probe: Probe) -> TCPStore:
    return TCPStore(probe.host, probe.port, is_master=False, timeout=timedelta(seconds=probe.timeout))


def _problem(rank: int) -> str:
    return f"problem {rank}"
