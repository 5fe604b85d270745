"""The machines of a plan. This module imports fast, so bad arguments are reported before DeepSpeed is imported."""

import math
from dataclasses import dataclass, field
from typing import Any

from loraprune_ds.errors import require

GIB = 1 << 30
# On 8 H100 of one machine NCCL held 1.06 GB before the first all-to-all and 4.34 GB after it (NVIDIA/nccl #1685). For a
# rank elsewhere: two channels with a buffer of 4 MiB each way (NCCL's defaults, not measured).
NCCL_RINGS = 1_060_000_000
NCCL_PER_NEAR_RANK = (4_340_000_000 - NCCL_RINGS) // 7
NCCL_PER_FAR_RANK = 2 * 2 * (4 << 20)
MOST_GPUS = 1 << 20  # no cluster is larger, so the number must be a typing error


def _option(default: float | None, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Cluster:
    """Describes the machines. A GB is 1e9 bytes."""

    nodes: int = _option(1, "machines; with --smallest the most to try, 512 if not given")
    gpus_per_node: int = _option(8, "GPUs of one machine")
    gpu_memory: float = _option(80.0, "GiB of one GPU")
    host_memory: float = _option(512.0, "GiB of host memory of one machine")
    reserve: float = _option(
        3.0, "GiB of a GPU for the CUDA context and the allocator's gaps. NCCL's come on top"
    )
    nccl: float | None = _option(
        None, "GiB of a GPU that NCCL takes; default: by the number of ranks"
    )
    host_reserve: float = _option(
        3.0, "GiB of host memory of a rank's process before it loads anything"
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_zero = value == 0 and name in ("reserve", "nccl", "host_reserve")
            require(
                value is None or is_zero or 0 < value < math.inf,
                f"--{name.replace('_', '-')} must be a number above 0; got {value}",
            )
        require(
            self.world_size <= MOST_GPUS,
            f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node} is more than {MOST_GPUS} GPUs",
        )
        reserved = f"--reserve {self.reserve}"
        if self.nccl_bytes:
            reserved += f" and --nccl {self.nccl_bytes / GIB:.1f}"
        require(
            self.gpu_bytes > 0, f"--gpu-memory {self.gpu_memory} leaves nothing after {reserved}"
        )

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu_bytes(self) -> int:
        return int((self.gpu_memory - self.reserve) * GIB) - self.nccl_bytes

    @property
    def nccl_bytes(self) -> int:
        """The GPU memory that NCCL takes for its rings and for every other rank."""
        if self.nccl is not None or self.world_size == 1:
            return int((self.nccl or 0) * GIB)
        near = self.gpus_per_node - 1
        far = self.world_size - self.gpus_per_node
        return NCCL_RINGS + near * NCCL_PER_NEAR_RANK + far * NCCL_PER_FAR_RANK

    @property
    def host_bytes(self) -> int:
        return int(self.host_memory * GIB)
