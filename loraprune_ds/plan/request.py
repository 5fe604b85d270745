"""Describes what is planned: model, run, cluster. It is read without loading a weight."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import SHIPPED, apply_override, config_from_dict, load_config
from loraprune_ds.errors import UserError, first_line
from loraprune_ds.files import read_json
from loraprune_ds.model.attention import attn_implementation
from loraprune_ds.model.distillation import check_top_k
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.frozen import Held
from loraprune_ds.model.hub import EMBEDDED, HUB_ERRORS
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.read_shape import check_family, shape_from_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.text_part import text_config
from loraprune_ds.plan.activations import PlannedBatch
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.pruning.limits import Limits, make_limits
from loraprune_ds.pruning.ranking import uniform_counts
from loraprune_ds.pruning.schedule import Schedule, make_schedule, steps_for_epochs
from loraprune_ds.pruning.target import find_ratio
from loraprune_ds.zero.ds_config import HPZ, FetchLimits, find_ds_config, resolve_ds_config
from loraprune_ds.zero.flat import partition_numel

ASSUMED_STEPS = 1000  # where a run counts epochs of data that are not here

# LLaMA (arXiv 2302.13971, table 2): hidden_size, layers, heads, intermediate_size; head_dim 128, 32,000 tokens.
LLAMA = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-30b": (6656, 60, 52, 17920),
    "llama-65b": (8192, 80, 64, 22016),
}


@dataclass(frozen=True)
class Request:
    """Describes a run on a cluster.

    Attributes:
        source: the model's config.json, or its text part.
        steps: optimizer steps, the recovery included.
        ds_config: DeepSpeed's JSON with every "auto" replaced.
        samples: in the training data, if known.
    """

    model: str
    source: dict[str, Any]
    shape: ModelShape
    config: RunConfig
    cluster: Cluster
    steps: int
    limits: Limits
    schedule: Schedule
    ds_config: dict[str, Any]
    samples: int | None = None

    @property
    def steps_known(self) -> bool:
        """Tells whether the run says how many steps it has. Else they are assumed."""
        return self.config.train.steps is not None or self.samples is not None

    @property
    def world_size(self) -> int:
        return self.cluster.world_size

    @property
    def micro_batches(self) -> int:
        """Returns the micro-batches of a rank in a step."""
        return self.config.train.gradient_accumulation_steps(self.world_size)

    @property
    def element_size(self) -> int:
        return DTYPES[self.config.model.dtype].itemsize

    @property
    def bucket_numel(self) -> int:
        return int(self.ds_config["zero_optimization"]["reduce_bucket_size"])

    @property
    def fetch_limits(self) -> FetchLimits:
        return FetchLimits.from_ds_config(self.ds_config)

    @property
    def eager(self) -> bool:
        """Tells whether attention holds whole matrices of probabilities."""
        return attn_implementation(self.config.model.attn_implementation, self.shape.family) == "eager"

    def batch(self, samples: int, window: int) -> PlannedBatch:
        """Describes a micro-batch."""
        return PlannedBatch(samples, window, self.element_size, self.eager)

    def shards(self, sizes: Iterable[int]) -> int:
        """Counts the elements of a rank's shards of such tensors."""
        return sum(partition_numel(numel, self.world_size) for numel in sizes)

    def held_shards(self, held: Iterable[Held]) -> int:
        """Counts the bytes of a rank's shards of such tensors."""
        return sum(x.element_size * partition_numel(math.prod(x.shape), self.world_size) for x in held)

    def second_copies(self, held: Iterable[Held]) -> int:
        """Counts the bytes of a rank's pieces of the second copy of such tensors. 0 without hpZ."""
        pieces = self.world_size // self.fetch_limits.copy_ranks if self.fetch_limits.copy_ranks > 1 else 0
        return self.held_shards(held) * pieces

    def lora_shards(self, shape: ModelShape) -> int:
        """Counts the elements of a rank's shards of all LoRA factors."""
        return self.shards(shape.lora_sizes(self.config.lora.r))

    def offloads(self, what: str) -> bool:
        """Tells whether "optimizer" or "param" is in host memory."""
        return self._offload(what).get("device") == "cpu"

    def pins(self, what: str) -> bool:
        """Tells whether the host memory of it is page-locked."""
        return self.offloads(what) and bool(self._offload(what).get("pin_memory"))

    def _offload(self, what: str) -> dict[str, Any]:
        return self.ds_config["zero_optimization"].get(f"offload_{what}") or {}

    def shape_at(self, target: float) -> ModelShape:
        """Returns the shape once `target` of the linear parameters is gone.

        The cuts of `uniform` are known before they happen. Those of `global` depend on scores. Here all layers lose
        alike.
        """
        dense, open_layers = self.shape, self.limits.open_layers
        if target <= 0:
            return dense
        if self.config.prune.ranking == "uniform":
            cut = [uniform_counts(self.limits, target, self.limits.ratio)] * len(dense.layers)
        else:
            leaving, cut = target * dense.linear_numel(), list(dense.layers)
            for kind, share in self.limits.shares.items():
                numel = sum(cut[i][kind] for i in open_layers) * dense.group_numel(kind)
                stays = 1 - leaving * share / numel
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
    """Reads everything that a plan rests on.

    Args:
        model: a folder, a hub id, or a name of LLAMA. None is the run config's model.
        config_path: YAML of the run. None is the shipped one of that name, or the defaults.
        overrides: `key=value`, as for launch/run.py.
        samples: in the training data, for a run that counts epochs.

    Raises:
        UserError: something cannot be used. The line is that of a run.
    """
    if config_path is None and model in LLAMA:
        config_path = str(SHIPPED / "launch" / "configs" / f"{model}.yaml")
    if config_path is None and model is None:
        raise UserError("give a model or --config")
    if config_path is not None:
        config = load_config(config_path, overrides)
    else:
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
    """Builds the request for a known shape.

    Raises:
        UserError: the run config does not fit the model or the number of ranks.
    """
    train = config.train
    check_family(config, shape.family, text_config(source, name), name)
    shape = replace(shape, int8=config.model.frozen == "int8")
    check_top_k(train.distill_top_k, shape.vocab_size)
    train.gradient_accumulation_steps(cluster.world_size)
    if samples is not None and samples < train.global_batch_size:
        raise UserError(f"--samples {samples} is less than train.global_batch_size {train.global_batch_size}")
    steps = train.steps
    if steps is None and samples is not None:
        steps = steps_for_epochs(train.epochs or 1, samples, train.global_batch_size)
    steps, limits = steps or ASSUMED_STEPS, make_limits(config.prune, shape, find_ratio(config.prune, shape))
    return Request(
        model=name,
        source=text_config(source, name),
        shape=shape,
        config=config,
        cluster=cluster,
        steps=steps + train.recovery_steps,
        limits=limits,
        schedule=make_schedule(config.prune, steps, limits),
        ds_config=_read_ds_config(config, shape, cluster),
        samples=samples,
    )


def changed(request: Request, cluster: Cluster | None = None, **sections: dict[str, Any]) -> Request:
    """Builds the same request with another cluster, or other values in sections: `train={...}`.

    `deepspeed={...}` are keys of zero_optimization. What hpZ's "auto" means depends on the cluster.

    Raises:
        UserError: the run cannot be split like that.
    """
    raw = request.config.to_dict()
    zero = sections.pop("deepspeed", {})
    for section, values in sections.items():
        raw[section] |= values
    config, where = config_from_dict(raw), cluster or request.cluster
    again = build_request(request.model, request.source, request.shape, config, where, samples=request.samples)
    kept = {key: value for key, value in request.ds_config["zero_optimization"].items() if key != HPZ}
    again.ds_config["zero_optimization"] |= kept | zero
    return again


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """Reads config.json alone. No weight is read or downloaded.

    Raises:
        UserError: the model is not found here or on the hub.
    """
    if model in LLAMA:
        hidden, layers, heads, channels = LLAMA[model]
        return {
            "model_type": "llama",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": channels,
            "vocab_size": 32_000,
        }
    folder = embedded_model_dir() if model == EMBEDDED else Path(model).expanduser()
    path = folder / "config.json" if folder.is_dir() else _download_config(model, revision)
    return read_json(path)


def read_shape(model: str) -> ModelShape:
    """Reads the sizes of a model as `make_request` finds it."""
    return shape_from_config(read_config(model), model)


def _read_ds_config(config: RunConfig, shape: ModelShape, cluster: Cluster) -> dict[str, Any]:
    """Reads DeepSpeed's JSON and replaces every "auto".

    Raises:
        UserError: a run would refuse it, or a group of hpZ has parts of several nodes.
    """
    path, per_node = find_ds_config(config.deepspeed), cluster.gpus_per_node
    resolved = resolve_ds_config(path, config, shape, cluster.world_size, ranks_per_node=per_node)
    size = FetchLimits.from_ds_config(resolved).copy_ranks
    if size % per_node and per_node % size:
        raise UserError(
            f"{path}: zero_optimization.{HPZ} is {size}, whose groups take parts of nodes of {per_node} GPUs; "
            f"give {per_node}"
        )
    return resolved


def _download_config(model: str, revision: str | None) -> Path:
    known = f"a folder, a hub id, or one of {', '.join(LLAMA)}"
    if model.startswith((".", "~", "/")) or model.count("/") != 1:
        raise UserError(f"model {model} does not exist; give {known}")
    try:
        return Path(hf_hub_download(model, "config.json", revision=revision))
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise UserError(f"model {model} is no folder and not available from the hub ({reason}); give {known}") from None
