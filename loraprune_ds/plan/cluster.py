"""The machines of a run that has not happened yet."""

import dataclasses
import math
from dataclasses import dataclass

from loraprune_ds.errors import UserError

GIB = 1 << 30
MOST_GPUS = 1 << 20  # beyond any machine there is: a number typed wrong


@dataclass(frozen=True)
class Cluster:
    """What the estimates of time and the verdict on memory rest on.

    Attributes:
        gpu_memory, host_memory: GiB of one GPU and of one node.
        reserve: GiB of each GPU that are not the run's: CUDA context, NCCL's buffers, the allocator's gaps.
        host_reserve: GiB of host memory that each rank's process holds before it loads anything.
        intra_bandwidth: GB/s (1e9 bytes) that a GPU can receive from GPUs of its node.
        inter_bandwidth: GB/s that a node can receive from the others, all its network cards together.
        host_bandwidth: GB/s between a GPU and host memory.
        flops: TFLOP/s of matrix products that a GPU sustains in the model's dtype, not its peak.
        flops64: the same in float64, for the solves of `prune.compensate: least_squares`.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    host_memory: float = 512.0
    reserve: float = 3.0
    host_reserve: float = 3.0
    intra_bandwidth: float = 300.0
    inter_bandwidth: float = 25.0
    host_bandwidth: float = 25.0
    flops: float = 125.0
    flops64: float = 10.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            least = 0 if field.name in ("reserve", "host_reserve") else None
            if not math.isfinite(value) or value < 0 or (value == 0 and least is None):
                raise UserError(f"{name} must be a number above 0; got {value}")
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
        """What a rank may hold on its GPU."""
        return int((self.gpu_memory - self.reserve) * GIB)

    @property
    def host_bytes(self) -> int:
        """What a node may hold in host memory."""
        return int(self.host_memory * GIB)

    def seconds_to_receive(self, per_rank: float) -> float:
        """Time for every rank to receive `per_rank` bytes spread evenly over all others.

        The slower of a GPU's own link and its node's network, which carries what comes from other nodes for all of
        the node's GPUs. Latencies are not counted.
        """
        if self.world_size == 1:
            return 0.0
        per_node = self._into_a_node(per_rank, distinct=self.gpus_per_node)
        return max(per_rank / (self.intra_bandwidth * 1e9), per_node / (self.inter_bandwidth * 1e9))

    def seconds_to_gather(self, per_rank: float) -> float:
        """The same for an all-gather or reduce-scatter, where a node needs each foreign byte once for all its GPUs."""
        if self.world_size == 1:
            return 0.0
        per_node = self._into_a_node(per_rank, distinct=1)
        return max(per_rank / (self.intra_bandwidth * 1e9), per_node / (self.inter_bandwidth * 1e9))

    def _into_a_node(self, per_rank: float, *, distinct: int) -> float:
        foreign = (self.world_size - self.gpus_per_node) / (self.world_size - 1)
        return per_rank * foreign * distinct
