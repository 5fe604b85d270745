"""Tests the collectives of a run between all ranks of a job, before the run. launch/preflight.py starts it."""

import multiprocessing
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import cast

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


@dataclass(frozen=True)
class Probe:
    """Describes the job whose ranks are tested. They meet at a store at `host` and `port`."""

    host: str
    port: int
    backend: str
    node: int
    nodes: int
    ranks_per_node: int
    timeout: float  # seconds for all ranks to answer

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def probe_node(probe: Probe) -> float:
    """Starts the ranks of this node. Returns the GB/s that the slowest of all ranks received in an all-to-all.

    Raises:
        RuntimeError: a rank failed or gave no answer. The message names it.
    """
    context, deadline = multiprocessing.get_context("spawn"), time.monotonic() + 2 * probe.timeout
    connections, processes = [], []
    for local in range(probe.ranks_per_node):
        ours, theirs = context.Pipe(duplex=False)
        processes.append(context.Process(target=_be_rank, args=(probe, local, theirs)))
        processes[-1].start()
        theirs.close()  # otherwise the pipe would not end with the rank
        connections.append(ours)
    answers = [_answer(connection, deadline) for connection in connections]
    for process in processes:
        process.kill()
    for local, answer in enumerate(answers):
        if isinstance(answer, str):
            raise RuntimeError(f"rank {probe.node * probe.ranks_per_node + local}: {answer}")
    return cast(float, answers[0])


def _answer(connection: Connection, deadline: float) -> float | str:
    try:
        return connection.recv() if connection.poll(max(0.0, deadline - time.monotonic())) else "no answer"
    except EOFError:
        return "no answer"


def _be_rank(probe: Probe, local: int, answer: Connection) -> None:
    """Runs the collectives on one rank. Answers with the speed, or a line about the problem."""
    rank = probe.node * probe.ranks_per_node + local
    timeout = timedelta(seconds=probe.timeout)
    try:
        device = "cpu" if probe.backend == "gloo" else f"cuda:{local}"
        if probe.backend != "gloo":
            torch.cuda.set_device(local)
        store = PrefixStore("ranks", TCPStore(probe.host, probe.port, is_master=False, timeout=timeout))
        distributed.init_process_group(
            probe.backend, store=store, rank=rank, world_size=probe.world_size, timeout=timeout
        )
        slowest = _exchange(rank, probe.world_size, device)
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
    distributed.all_to_all_single(received, sent)  # connects, which takes longer than the exchange itself
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
