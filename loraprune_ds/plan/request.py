"""Describes the model and the run of a plan, and counts what the ranks store of the model. No weight is loaded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import apply_override, config_from_dict, merge, read_config
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import attn_implementation
from loraprune_ds.model.frozen import DTYPES, StoredTensor
from loraprune_ds.model.groups import LayerCounts, TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.pretrained.read_shape import (
    LLAMA_SIZES,
    check_family,
    read_model_config,
    shape_from_config,
)
from loraprune_ds.pretrained.text_part import MULTIMODAL, check_tower, text_config
from loraprune_ds.pruning.compensate import measured_linears, numel_sent
from loraprune_ds.pruning.schedule import Schedule, plan_pruning, steps_for_epochs
from loraprune_ds.pruning.target import final_shape, resolve
from loraprune_ds.ranks.flat import partition_numel
from loraprune_ds.zero.ds_config import HPZ, ZeroSettings, resolve_ds_config

ASSUMED_STEPS = 1000  # for a run that counts epochs of absent data


@dataclass(frozen=True)
class PlannedBatch:
    """Describes one micro-batch: `samples` windows of `window` tokens."""

    samples: int
    window: int
    element_size: int
    eager: bool = False  # attention stores full matrices of probabilities

    @property
    def tokens(self) -> int:
        return self.samples * self.window

    @property
    def copy_size(self) -> int:
        """The bytes of an element's 16-bit copy next to its fp32 form. An fp32 model has none."""
        return self.element_size if self.element_size < 4 else 0

    @property
    def stored_pairs(self) -> int:
        """The elements of a head's attention probabilities. Only eager attention stores them."""
        return self.eager * self.samples * self.window**2

    @property
    def causal_mask(self) -> int:
        return self.element_size * self.stored_pairs


@dataclass(frozen=True)
class Request:
    """Describes a run on a cluster."""

    model: str
    source: JsonObject  # config.json, or its text part
    shape: ModelShape
    config: RunConfig
    cluster: Cluster
    schedule: Schedule
    ds_config: JsonObject  # with every "auto" replaced
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
    def int8(self) -> bool:
        return self.config.model.frozen == "int8"

    @property
    def element_size(self) -> int:
        return DTYPES[self.config.model.dtype].itemsize

    @cached_property
    def fetch(self) -> ZeroSettings:
        return ZeroSettings(**self.ds_config["zero_optimization"])

    def measured(self, shape: ModelShape) -> list[tuple[int, TensorSpec]]:
        """Lists the linears whose inputs `prune.compensate` measures."""
        layers = self.schedule.limits.open_layers if self.config.prune.compensate != "none" else []
        return measured_linears(shape, layers)

    def moment_numel(self, shape: ModelShape) -> int:
        """Counts the elements of half the second moments of these inputs."""
        return sum(numel_sent(linear.inputs) for _, linear in self.measured(shape))

    def batch(self, samples: int, window: int) -> PlannedBatch:
        attention = attn_implementation(self.config.model.attn_implementation, self.shape.family)
        return PlannedBatch(samples, window, self.element_size, eager=attention == "eager")

    @property
    def training_batch(self) -> PlannedBatch:
        return self.batch(self.config.train.micro_batch_size, self.config.data.window)

    def stored(self, shape: ModelShape) -> list[StoredTensor]:
        """Lists the frozen tensors that ZeRO-3 shards."""
        return list(shape.stored(self.element_size, int8=self.int8).values())

    def stored_as(self, *tensors: TensorSpec) -> list[StoredTensor]:
        """As `stored`, of some tensors of a layer."""
        size = self.element_size
        return [part for x in tensors for part in x.stored(size, self.int8).values()]

    @cached_property
    def taught(self) -> list[StoredTensor]:
        """Lists the frozen tensors of the teacher, which has no head. None without distillation."""
        if not self.config.train.distill_weight:
            return []
        stored = self.shape.stored(self.element_size, int8=self.int8)
        stored.pop("lm_head.weight", None)
        return list(stored.values())

    def shard_numel(self, numel: int) -> int:
        """Counts the elements of a rank's shard of so many elements."""
        return partition_numel(numel, self.world_size)

    def shard_bytes(self, tensors: Iterable[StoredTensor]) -> int:
        """Counts the bytes of a rank's shards."""
        return sum(x.element_size * self.shard_numel(math.prod(x.shape)) for x in tensors)

    def lora_shards(self, shape: ModelShape) -> int:
        """Counts the elements of a rank's shards of LoRA."""
        return sum(map(self.shard_numel, shape.lora_numel(self.config.lora.r)))

    def second_copy(self, shard_bytes: int) -> int:
        """Counts the bytes of a rank's part of hpZ's second copy of such shards. 0 without hpZ."""
        group = self.fetch.zero_hpz_partition_size
        return shard_bytes * (self.world_size // group) if group > 1 else 0

    def offloads(self, what: str, *, pinned: bool = False) -> bool:
        """Returns True if "optimizer" or "param" is in host memory, and page-locked if `pinned`."""
        section = self.ds_config["zero_optimization"].get(f"offload_{what}") or {}
        return section.get("device") == "cpu" and (not pinned or bool(section.get("pin_memory")))

    def shape_at(self, step: int) -> ModelShape:
        """Returns the shape after a step. `global` is planned with equal losses."""
        limits = self.schedule.limits
        section = self.schedule.section(step)
        dense = self.shape
        if counts := section.counts(step):
            return limits.with_equal(counts)
        budget = section.budget(step)
        leaving = limits.leaving(budget.ratio)
        numel = limits.numel(dense.counts)
        layers = list(dense.counts)
        for i in limits.open_layers:
            counts = dict(layers[i])
            for kind, count in counts.items():
                stays = 1 - leaving * budget.shares[kind] / max(1, numel[kind])
                counts[kind] = max(min(1, count), round(count * stays))
            layers[i] = LayerCounts(counts)
        return dense.resized(layers)


def make_request(
    model: str | None,
    cluster: Cluster,
    *,
    config_path: str | None = None,
    overrides: Sequence[str] = (),
    samples: int | None = None,
) -> Request:
    """Reads the input of a plan, given the arguments of launch/plan.py. Raises the errors that a run would raise."""
    if model in LLAMA_SIZES:
        config_path = config_path or f"launch/configs/paper/{model}.yaml"
    require(model is not None or config_path is not None, "give a model or --config")
    raw: JsonObject = {"output_dir": "unused", "train": {"steps": 100}}
    if config_path is not None:
        raw = read_config(config_path)
    for override in overrides:
        apply_override(raw, override)
    config = config_from_dict(raw)
    name = model or config.model.path
    source = read_model_config(name, config.model.revision)
    shape = shape_from_config(source, name)
    return build_request(name, source, shape, config, cluster, samples=samples)


def build_request(
    name: str,
    source: JsonObject,
    shape: ModelShape,
    config: RunConfig,
    cluster: Cluster,
    *,
    samples: int | None = None,
) -> Request:
    """Builds the request for a known shape. Raises UserError if the run config does not fit model or ranks."""
    train = config.train
    text = text_config(source, name)
    check_family(shape.family, text, name, config.model.dtype, packing=config.data.packs_rows)
    train.gradient_accumulation_steps(cluster.world_size)
    require(
        samples is None or samples >= train.global_batch_size,
        f"--samples {samples} is less than train.global_batch_size {train.global_batch_size}",
    )
    if samples is None and isinstance(config.data.path, str):
        samples = config.data.max_samples
    steps = train.steps
    if steps is None and samples:
        steps = steps_for_epochs(train.epochs or 1, samples, train.global_batch_size)
    tower = source.get("model_type") in MULTIMODAL and not config.model.text_only
    prune, limits, sizes = resolve(config.prune, shape, tower=tower)
    if tower:
        check_tower(source, final_shape(limits, sizes), name)
    config = replace(config, prune=prune)
    schedule = plan_pruning(prune, limits, sizes, steps or ASSUMED_STEPS, config.recovery)
    if steps:  # an assumed number of steps refuses nothing
        train.check_warmup(schedule.cycles()[0])
    per_node = cluster.gpus_per_node
    require(
        config.deepspeed is not None,
        "deepspeed is null, but a plan needs ds_configs/zero3.json or another",
    )
    ds_config = resolve_ds_config(config, shape, cluster.world_size, per_node)
    size = ZeroSettings(**ds_config["zero_optimization"]).zero_hpz_partition_size
    is_whole = size % per_node == 0 or per_node % size == 0
    require(
        is_whole,
        f"{config.deepspeed}: zero_optimization.{HPZ} is {size}, whose groups take parts of nodes of {per_node} GPUs",
    )
    return Request(name, text, shape, config, cluster, schedule, ds_config, samples)


def changed(request: Request, cluster: Cluster | None = None, **sections: JsonObject) -> Request:
    """Builds the same request with another cluster, or other values in sections: `train={...}`.

    `deepspeed={...}` are keys of zero_optimization. hpZ's "auto" depends on the cluster and is resolved again.
    """
    zero = sections.pop("deepspeed", {})
    config = config_from_dict(merge(request.config.to_dict(), sections))
    new = build_request(
        request.model,
        request.source,
        request.shape,
        config,
        cluster or request.cluster,
        samples=request.samples,
    )
    settings = request.ds_config["zero_optimization"] | zero
    if HPZ not in zero:
        settings.pop(HPZ, None)
    new.ds_config["zero_optimization"] |= settings
    return new
