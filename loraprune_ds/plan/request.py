"""Describes the model, run and cluster of a plan. No weight is loaded."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import SHIPPED, apply_override, config_from_dict, load_config
from loraprune_ds.errors import require
from loraprune_ds.model.classes import attn_implementation
from loraprune_ds.model.distillation import check_top_k
from loraprune_ds.model.frozen import DTYPES, StoredTensor
from loraprune_ds.model.read_shape import LLAMA, check_family, read_config, shape_from_config, text_config
from loraprune_ds.model.shapes import LayerShape, ModelShape
from loraprune_ds.model.storage import FrozenStorage
from loraprune_ds.pruning.ranking import uniform_counts
from loraprune_ds.pruning.schedule import PruningPlan, plan_pruning, steps_for_epochs
from loraprune_ds.zero.ds_config import HPZ, DeepSpeedZeroConfig, find_ds_config, resolve_ds_config, zero_settings
from loraprune_ds.zero.flat import partition_numel

GIB = 1 << 30
# On 8 H100 of one machine NCCL held 1.06 GB before the first all-to-all and 4.34 GB after it (NVIDIA/nccl #1685). For a
# rank elsewhere: two channels with a buffer of 4 MiB each way (NCCL's defaults, not measured).
NCCL_RINGS = 1_060_000_000
NCCL_PER_NEAR_RANK = (4_340_000_000 - NCCL_RINGS) // 7
NCCL_PER_FAR_RANK = 2 * 2 * (4 << 20)
MOST_GPUS = 1 << 20  # beyond any machine there is: a number typed wrong


def _option(default: float | None, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclass(frozen=True)
class Cluster:
    """Describes the machines. A GB is 1e9 bytes."""

    nodes: int = _option(1, "machines; with --smallest the most to try, 512 if not given")
    gpus_per_node: int = _option(8, "GPUs of one machine")
    gpu_memory: float = _option(80.0, "GiB of one GPU")
    host_memory: float = _option(512.0, "GiB of host memory of one machine")
    reserve: float = _option(3.0, "GiB of a GPU for the CUDA context and the allocator's gaps. NCCL's come on top")
    nccl: float | None = _option(None, "GiB of a GPU that NCCL takes; default: by the number of ranks")
    host_reserve: float = _option(3.0, "GiB of host memory of a rank's process before it loads anything")
    intra_bandwidth: float = _option(300.0, "GB/s a GPU receives from GPUs of its machine")
    inter_bandwidth: float = _option(25.0, "GB/s a machine receives from the others")  # all its network cards together
    host_bandwidth: float = _option(25.0, "GB/s between GPU and host memory")
    flops: float = _option(312.0, "TFLOP/s of a GPU in matrix products of the model's dtype, as its maker says")
    utilisation: float = _option(0.4, "fraction of these that a run reaches")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            may_be_zero = name in ("reserve", "nccl", "host_reserve")
            good = value is None or (math.isfinite(value) and value >= 0 and (value > 0 or may_be_zero))
            require(good, f"--{name.replace('_', '-')} must be a number above 0; got {value}")
        gpus = f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node}"
        require(self.world_size <= MOST_GPUS, f"{gpus} is more than {MOST_GPUS} GPUs")
        held = f"--reserve {self.reserve}" + (f" and --nccl {self.nccl_bytes / GIB:.1f}" if self.nccl_bytes else "")
        require(self.gpu_bytes > 0, f"--gpu-memory {self.gpu_memory} leaves nothing beside {held}")

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def gpu_bytes(self) -> int:
        return int((self.gpu_memory - self.reserve) * GIB) - self.nccl_bytes

    @property
    def nccl_bytes(self) -> int:
        """The memory of a GPU that NCCL takes for its rings and for every other rank."""
        if self.nccl is not None or self.world_size == 1:
            return int((self.nccl or 0) * GIB)
        near, far = self.gpus_per_node - 1, self.world_size - self.gpus_per_node
        return NCCL_RINGS + near * NCCL_PER_NEAR_RANK + far * NCCL_PER_FAR_RANK

    @property
    def host_bytes(self) -> int:
        return int(self.host_memory * GIB)

    def between_nodes(self, per_rank: float, ranks: int) -> float:
        """Returns the part of `per_rank` bytes that goes to other nodes, if a rank sends them evenly to `ranks`."""
        return per_rank * max(0, ranks - self.gpus_per_node) / max(1, ranks - 1)

    def seconds_to_receive(self, per_rank: float, ranks: int) -> float:
        """Returns the time in which every rank receives `per_rank` bytes over the slower link, without latencies."""
        per_node = self.between_nodes(per_rank, ranks)  # a byte enters a node once for all its GPUs
        return max(per_rank / (self.intra_bandwidth * 1e9), per_node / (self.inter_bandwidth * 1e9))


ASSUMED_STEPS = 1000  # where a run counts epochs of data that are not here


@dataclass(frozen=True)
class PlannedBatch:
    """Describes one micro-batch: `samples` windows of `window` tokens."""

    samples: int
    window: int
    element_size: int
    eager: bool = False  # attention holds whole matrices of probabilities

    @property
    def tokens(self) -> int:
        return self.samples * self.window

    @property
    def copy_size(self) -> int:
        """The bytes of an element's 16-bit copy next to its fp32 form. An fp32 model has none."""
        return self.element_size if self.element_size < 4 else 0

    @property
    def causal_mask(self) -> int:
        return self.eager * self.element_size * self.samples * self.window**2

    def probabilities(self, shape: ModelShape, layer: LayerShape) -> int:
        """Counts the elements of one layer's attention probabilities, which only eager attention holds."""
        return self.eager * self.samples * shape.query_heads(layer) * self.window**2


@dataclass(frozen=True)
class Request:
    """Describes a run on a cluster."""

    model: str
    source: dict[str, Any]  # config.json, or its text part
    shape: ModelShape
    config: RunConfig
    cluster: Cluster
    steps: int  # the recovery included
    pruning: PruningPlan
    ds_config: dict[str, Any]  # with every "auto" replaced
    samples: int | None = None  # in the training data, if known

    @property
    def steps_known(self) -> bool:
        return self.config.train.steps is not None or self.samples is not None

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def micro_batches(self) -> int:
        return self.config.train.gradient_accumulation_steps(self.world_size)

    @property
    def storage(self) -> FrozenStorage:
        return FrozenStorage.from_config(self.config.model)

    @property
    def element_size(self) -> int:
        return DTYPES[self.config.model.dtype].itemsize

    @property
    def gradient_size(self) -> int:
        """The bytes of an element of the true gradient when it is formed. fp16 is too narrow for it."""
        return 4 if self.config.model.dtype == "float16" else self.element_size

    @cached_property
    def fetch(self) -> DeepSpeedZeroConfig:
        """DeepSpeed's settings for gathers, in elements. `zero_hpz_partition_size` ranks share a second copy."""
        return zero_settings(self.ds_config)

    @property
    def measured_layers(self) -> Sequence[int]:
        """The layers whose inputs `prune.compensate` measures."""
        return self.pruning.limits.open_layers if self.config.prune.compensate != "none" else ()

    def batch(self, samples: int, window: int) -> PlannedBatch:
        eager = attn_implementation(self.config.model.attn_implementation, self.shape.family) == "eager"
        return PlannedBatch(samples, window, self.element_size, eager)

    def held(self, shape: ModelShape, layer: int | None = None) -> list[StoredTensor]:
        """Lists what ZeRO-3 shards of the frozen weights of a layer, or of all."""
        return list(self.storage.stored(shape, self.element_size, layer).values())

    def lora_shards(self, shape: ModelShape) -> int:
        return self.shards(shape.lora_sizes(self.config.lora.r))

    def shards(self, sizes: Iterable[int]) -> int:
        """Counts the elements of a rank's shards."""
        return sum(partition_numel(numel, self.world_size) for numel in sizes)

    def held_shards(self, held: Iterable[StoredTensor]) -> int:
        """Counts the bytes of a rank's shards."""
        return sum(x.element_size * partition_numel(math.prod(x.shape), self.world_size) for x in held)

    def gradient_shards(self, shape: ModelShape) -> int:
        """Counts the elements of a rank's shards of the true gradient, if the criterion needs it."""
        if self.config.prune.criterion != "gradient":
            return 0
        return self.shards(math.prod(shape.linear_shape(i, linear)) for i, linear in shape.linear_ids())

    def second_copies(self, held: Iterable[StoredTensor]) -> int:
        """Counts the bytes of a rank's part of hpZ's second copy. 0 without hpZ."""
        group = self.fetch.zero_hpz_partition_size
        return self.held_shards(held) * (self.world_size // group) if group > 1 else 0

    @property
    def zero(self) -> dict[str, Any]:
        return self.ds_config["zero_optimization"]

    def offloads(self, what: str, *, pinned: bool = False) -> bool:
        """Returns True if "optimizer" or "param" is in host memory, and page-locked if `pinned`."""
        found = self.zero.get(f"offload_{what}") or {}
        return found.get("device") == "cpu" and (not pinned or bool(found.get("pin_memory")))

    def shape_at(self, target: float) -> ModelShape:
        """Returns the shape once `target` of the linear parameters is gone. With `global` all layers lose the same."""
        dense, open_layers, cut = self.shape, self.pruning.limits.open_layers, list(self.shape.layers)
        if self.config.prune.ranking == "uniform":
            cut = [uniform_counts(self.pruning.limits, target, self.pruning.limits.ratio)] * len(dense.layers)
        else:
            for kind, share in self.pruning.limits.shares.items():
                numel = sum(cut[i][kind] * dense.group_numel(kind) for i in open_layers)
                stays = 1 - target * dense.linear_numel() * share / numel
                cut = [LayerShape({**x, kind: max(min(1, x[kind]), round(x[kind] * stays))}) for x in cut]
        return dense.with_layers(tuple(cut[i] if i in open_layers else x for i, x in enumerate(dense.layers)))


def make_request(
    model: str | None,
    cluster: Cluster,
    *,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    samples: int | None = None,
) -> Request:
    """Reads everything that a plan needs, with the arguments of launch/plan.py. Raises the errors that a run would."""
    if model in LLAMA:
        config_path = config_path or str(SHIPPED / "launch" / "configs" / f"{model}.yaml")
    if config_path is not None:
        config = load_config(config_path, overrides)
    else:
        require(model is not None, "give a model or --config")
        raw: dict[str, Any] = {"output_dir": "unused", "train": {"steps": 100}}
        for override in overrides:
            apply_override(raw, override)
        config = config_from_dict(raw)
    name = model or config.model.path
    source = read_config(name, config.model.revision)
    return build_request(name, source, shape_from_config(source, name), config, cluster, samples=samples)


def build_request(
    name: str,
    source: dict[str, Any],
    shape: ModelShape,
    config: RunConfig,
    cluster: Cluster,
    *,
    samples: int | None = None,
) -> Request:
    """Builds the request for a known shape. Raises UserError if the run config does not fit model or ranks."""
    train = config.train
    source = text_config(source, name)
    check_family(shape.family, source, name, config.prune, packing=config.data.packing)
    check_top_k(train.distill_top_k, shape.vocab_size)
    train.gradient_accumulation_steps(cluster.world_size)
    few = f"--samples {samples} is less than train.global_batch_size {train.global_batch_size}"
    require(samples is None or samples >= train.global_batch_size, few)
    steps = train.steps or ASSUMED_STEPS
    if train.steps is None and samples is not None:
        steps = steps_for_epochs(train.epochs or 1, samples, train.global_batch_size)
    pruning = plan_pruning(config.prune, shape, steps)
    path, per_node, model = find_ds_config(config.deepspeed), cluster.gpus_per_node, config.model
    ds_config = resolve_ds_config(path, shape, cluster.world_size, train, model, config.lora.r, ranks_per_node=per_node)
    size = zero_settings(ds_config).zero_hpz_partition_size
    bad = f"{path}: zero_optimization.{HPZ} is {size}, whose groups take parts of nodes of {per_node} GPUs"
    require(size % per_node == 0 or per_node % size == 0, bad)
    steps += train.recovery_steps
    return Request(name, source, shape, config, cluster, steps, pruning, ds_config, samples)


def changed(request: Request, cluster: Cluster | None = None, **sections: dict[str, Any]) -> Request:
    """Builds the same request with another cluster, or other values in sections: `train={...}`.

    `deepspeed={...}` are keys of zero_optimization. hpZ's "auto" depends on the cluster and is resolved again.
    """
    raw, zero, where = request.config.to_dict(), sections.pop("deepspeed", {}), cluster or request.cluster
    for section, values in sections.items():
        raw[section] |= values
    config, samples = config_from_dict(raw), request.samples
    again = build_request(request.model, request.source, request.shape, config, where, samples=samples)
    again.zero.update({key: value for key, value in request.zero.items() if key != HPZ} | zero)
    return again
