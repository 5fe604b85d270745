"""Machines of a run that has not happened yet."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from loraprune_ds.errors import UserError

GIB = 1 << 30
MOST_GPUS = 1 << 20  # beyond any machine there is: a number typed wrong


def _option(default: float, meaning: str) -> Any:
    """Builds a field that is an option of launch/plan.py."""
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Cluster:
    """Describes the machines. A GB is 1e9 bytes."""

    nodes: int = _option(1, "machines; with --smallest the most to try, 512 if not given")
    gpus_per_node: int = _option(8, "GPUs of one machine")
    gpu_memory: float = _option(80.0, "GiB of one GPU")
    host_memory: float = _option(512.0, "GiB of host memory of one machine")
    reserve: float = _option(3.0, "GiB of a GPU that are not the run's: CUDA context, NCCL, gaps")
    host_reserve: float = _option(3.0, "GiB of host memory of a rank's process before it loads anything")
    intra_bandwidth: float = _option(300.0, "GB/s a GPU receives from GPUs of its machine")
    inter_bandwidth: float = _option(25.0, "GB/s a machine receives from the others")  # all its network cards together
    host_bandwidth: float = _option(25.0, "GB/s between GPU and host memory")
    flops: float = _option(125.0, "TFLOP/s that a GPU sustains in matrix products")  # in the model's dtype, no peak
    flops64: float = _option(10.0, "TFLOP/s that a GPU sustains in matrix products in float64, for a refit")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            may_be_zero = name in ("reserve", "host_reserve")
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                raise UserError(f"--{name.replace('_', '-')} must be a number above 0; got {value}")
        if self.world_size > MOST_GPUS:
            raise UserError(
                f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node} is more than {MOST_GPUS} GPUs"
            )
        if self.reserve >= self.gpu_memory:
            raise UserError(f"--gpu-memory {self.gpu_memory} leaves nothing beside --reserve {self.reserve}")

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu_bytes(self) -> int:
        """Returns the limit of a rank."""
        return int((self.gpu_memory - self.reserve) * GIB)

    @property
    def host_bytes(self) -> int:
        """Returns the limit of a node."""
        return int(self.host_memory * GIB)

    def seconds_to_receive(self, per_rank: float, *, same_for_all: bool) -> float:
        """Returns the time in which every rank receives `per_rank` bytes.

        They come evenly from all others. Bytes from other nodes share the network of the node. The slower link counts:
        the GPU's own or that network. Latencies are not counted.

        Args:
            same_for_all: all ranks receive the same bytes (all-gather). A byte then enters a node once for all its
                GPUs. A reduce-scatter takes as long.
        """
        if self.world_size == 1:
            return 0.0
        foreign = (self.world_size - self.gpus_per_node) / (self.world_size - 1)
        per_node = per_rank * foreign * (1 if same_for_all else self.gpus_per_node)
        return max(per_rank / (self.intra_bandwidth * 1e9), per_node / (self.inter_bandwidth * 1e9))
