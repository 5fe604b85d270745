"""Describes the model and the run of a plan, and counts what the ranks store of the model. No weight is loaded."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import apply_override, config_from_dict, read_config
from loraprune_ds.engine.ds_config import HPZ, ZeroSettings, resolve_ds_config
from loraprune_ds.engines import deepspeed_sections
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.classes import attn_implementation
from loraprune_ds.model.frozen import DTYPES, StoredTensor
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.storage import Storage
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.pretrained.read_shape import (
    LLAMA_SIZES,
    check_family,
    read_model_config,
    shape_from_config,
)
from loraprune_ds.pretrained.text_part import MULTIMODAL, check_tower, text_config
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import Schedule, make_schedule, steps_for_epochs
from loraprune_ds.ranks.flat import partition_numel

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
    steps_known: bool = True  # or assumed
    overrides: Sequence[str] = ()  # of this request, as `--set` gives them

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def micro_batches(self) -> int:
        return self.config.train.gradient_accumulation_steps(self.world_size)

    @property
    def is_local(self) -> bool:
        """True if the run is one process without DeepSpeed."""
        return self.config.deepspeed is None

    @property
    def refits(self) -> bool:
        return self.config.prune.compensate != "none"

    @property
    def element_size(self) -> int:
        return DTYPES[self.config.model.dtype].itemsize

    @cached_property
    def fetch(self) -> ZeroSettings:
        return ZeroSettings(**self.ds_config["zero_optimization"])

    def batch(self, samples: int, window: int) -> PlannedBatch:
        attention = attn_implementation(self.config.model.attn_implementation, self.shape.family)
        return PlannedBatch(samples, window, self.element_size, eager=attention == "eager")

    @property
    def training_batch(self) -> PlannedBatch:
        return self.batch(self.config.train.micro_batch_size, self.config.data.window)

    @property
    def storage(self) -> Storage:
        model = self.config.model
        return Storage(model.frozen, self.refits, DTYPES[model.dtype])

    def stored(self, shape: ModelShape) -> list[StoredTensor]:
        """Lists the frozen tensors that ZeRO-3 shards."""
        return list(self.storage.stored(shape).values())

    def stored_as(self, *tensors: TensorSpec) -> list[StoredTensor]:
        """As `stored`, of some tensors."""
        return [part for tensor in tensors for part in self.storage.parts(tensor).values()]

    def dequantised(self, linear: TensorSpec) -> int:
        """Counts the bytes while a linear is dequantised, of a stack one expert. 0 if its weight is stored."""
        if self.config.model.frozen is None:
            return 0
        return self.element_size * (linear.numel // linear.matrices)

    @cached_property
    def taught(self) -> list[StoredTensor]:
        """Lists the frozen tensors of the teacher, which has no head. None without distillation."""
        if not self.config.train.distill_weight:
            return []
        stored = self.storage._replace(refits=False).stored(self.shape)
        stored.pop("lm_head.weight", None)
        return list(stored.values())

    def shard_numel(self, numel: int) -> int:
        """Counts the elements of a rank's shard of so many elements."""
        return partition_numel(numel, self.world_size)

    def shard_bytes(self, tensors: Iterable[StoredTensor]) -> int:
        """Counts the bytes of a rank's shards."""
        return sum(x.dtype.itemsize * self.shard_numel(math.prod(x.shape)) for x in tensors)

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
        return self.schedule.goal.shape_at(self.schedule.fraction(step))


class Run(NamedTuple):
    """A model and the config of a run, on any cluster."""

    name: str
    source: JsonObject  # config.json
    shape: ModelShape
    config: RunConfig


def read_run(
    model: str | None, *, config_path: str | None = None, overrides: Sequence[str] = ()
) -> Run:
    """Reads the input of a plan, given the arguments of launch/plan.py. Raises the errors that a run would raise."""
    if model in LLAMA_SIZES:
        config_path = config_path or f"launch/configs/paper/{model}.yaml"
    require(model is not None or config_path is not None, "give a model or --config")
    raw: JsonObject = {"train": {"steps": 100}}
    if config_path is not None:
        raw = read_config(config_path)
    raw.setdefault("output_dir", "unused")  # a plan writes nothing
    for override in overrides:
        apply_override(raw, override)
    config = config_from_dict(raw)
    name = model or config.model.path
    source = read_model_config(name, config.model.revision)
    return Run(name, source, shape_from_config(source, name), config)


def build_request(
    name: str,
    source: JsonObject,
    shape: ModelShape,
    config: RunConfig,
    cluster: Cluster,
    overrides: Sequence[str] = (),
) -> Request:
    """Builds the request for a known shape. Raises UserError if the run config does not fit model or ranks."""
    if overrides:
        raw = config.to_dict()
        for override in overrides:
            apply_override(raw, override)
        config = config_from_dict(raw)
    train = config.train
    train.gradient_accumulation_steps(cluster.world_size)
    text = text_config(source, name)
    check_family(shape.family, text, name, config.model.dtype, packing=config.data.packs_rows)
    Storage(config.model.frozen).check(shape, name)
    samples = config.data.max_samples
    steps = train.steps
    if steps is None and samples and isinstance(config.data.path, str):
        require(
            samples >= train.global_batch_size,
            f"data.max_samples {samples} is less than train.global_batch_size {train.global_batch_size}",
        )
        steps = steps_for_epochs(train.epochs or 1, samples, train.global_batch_size)
    tower = source.get("model_type") in MULTIMODAL and not config.model.text_only
    goal = make_goal(config.prune, shape, tower=tower)
    if tower:
        check_tower(source, goal.final_shape, name)
    config = replace(config, prune=goal.config)
    schedule = make_schedule(goal, steps or ASSUMED_STEPS, train.recovery_steps)
    if steps:  # an assumed number of steps refuses nothing
        train.check_warmup(steps)
    per_node = cluster.gpus_per_node
    require(
        config.deepspeed is not None or cluster.world_size == 1,
        f"deepspeed is null: one process trains, not {cluster.world_size}; "
        "set --nodes 1 and --gpus-per-node 1, or deepspeed",
    )
    ds_config = resolve_ds_config(config, shape, deepspeed_sections(), cluster.world_size, per_node)
    ds_config = ds_config or {"zero_optimization": {"reduce_bucket_size": 0}}
    size = ZeroSettings(**ds_config["zero_optimization"]).zero_hpz_partition_size
    is_whole = size % per_node == 0 or per_node % size == 0
    require(
        is_whole,
        f"{config.deepspeed}: zero_optimization.{HPZ} is {size}, whose groups take parts of nodes of {per_node} GPUs",
    )
    known = steps is not None
    return Request(name, text, shape, config, cluster, schedule, ds_config, known, overrides)


def full_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Counts the bytes of unsharded tensors."""
    return sum(tensor.nbytes for tensor in tensors)
