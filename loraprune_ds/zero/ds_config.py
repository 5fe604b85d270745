"""DeepSpeed's JSON. This module fills in the settings of the run config, which are "auto" in the JSON.

It imports DeepSpeed only to check values, so a plan needs none.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import dotted_values, find_shipped
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.storage import Storage
from loraprune_ds.versions import is_new

MAX_BUCKET = 50_000_000  # elements. Every rank allocates a full reduce bucket

# Settings that the run config owns.
OWNED = {
    ("optimizer",): "the run config owns the optimizer (train.learning_rate, train.adam_*)",
    ("scheduler",): "the run config owns the schedule (train.lr_scheduler, train.warmup_steps)",
    (
        "elasticity",
    ): "the run config owns the batch sizes (train.global_batch_size, train.micro_batch_size)",
    ("curriculum_learning",): "the run config owns the data (data.window)",
    ("data_efficiency",): "the run config owns the data",
}
# Settings that cannot work with a cut, in any trainer.
REFUSED_KEYS = {
    ("torch_autocast",): "weights have model.dtype; autocast is not supported",
    ("amp",): "weights have model.dtype; apex is not supported",
    (
        "zero_optimization",
        "cpu_offload",
    ): "removed from DeepSpeed; write offload_optimizer: {device: cpu}",
    (
        "zero_optimization",
        "cpu_offload_param",
    ): "removed from DeepSpeed; write offload_param: {device: cpu}",
    (
        "zero_optimization",
        "mics_shard_size",
    ): "removed from DeepSpeed; use hpZ (zero_hpz_partition_size)",
    (
        "zero_optimization",
        "zero_quantized_weights",
    ): "quantized weights have no flat shards to reshard",
    (
        "zero_optimization",
        "zero_quantized_nontrainable_weights",
    ): "quantized weights cannot be resharded",
    ("zero_optimization", "zero_quantized_gradients"): "scores need the exact LoRA gradients",
    ("zero_optimization", "zenflow"): "ZenFlow is not supported",
    (
        "zero_optimization",
        "stage3_module_granularity_threshold",
    ): "modules gathered whole are not supported",
    (
        "zero_optimization",
        "module_granularity_threshold",
    ): "modules gathered whole are not supported",
    ("bf16", "bf16_master_weights_and_grads"): "LoRA's masters and gradients are fp32",
    ("bf16", "bf16_optimizer_states"): "Adam's moments are fp32",
    ("fp16", "fp16_master_weights_and_grads"): "LoRA's masters and gradients are fp32",
    ("prescale_gradients",): "DeepSpeed's ZeRO-3 has no prescaled gradients",
    ("gradient_predivide_factor",): "DeepSpeed's ZeRO-3 has no predivided gradients",
    (
        "sequence_parallel_size",
    ): "every rank reads complete samples; sequence parallelism is not supported",
    (
        "expert_parallel",
    ): "AutoEP spreads experts over ranks; ZeRO-3 shards them, and cuts its shards",
    ("compile", "deepcompile"): "DeepCompile keeps the sizes from before a cut",
    (
        "checkpoint",
        "load_universal",
    ): "a universal checkpoint has the dense sizes; go on with --resume or resume()",
    ("tensor_parallel",): "linears split over ranks are not supported; ZeRO-3 shards them",
    ("compression_training",): "DeepSpeed's own compression is not supported",
    ("progressive_layer_drop",): "dropping layers at random is not supported",
}
# Settings with some supported values: these values, and the reason against others.
_OPTIMIZER = ("zero_optimization", "offload_optimizer")
ONLY: dict[tuple[str, ...], tuple[tuple[Any, ...], str]] = {
    (*_OPTIMIZER, "device"): (
        ("none", "cpu"),
        "masters and moments on NVMe cannot be cut; use cpu",
    ),
    (*_OPTIMIZER, "ratio"): (
        (1,),
        "partial offload would need a second optimizer; offload all of it",
    ),
    (*_OPTIMIZER, "super_offload"): (
        (False,),
        "SuperOffload has its own optimizer, whose state cannot be resharded",
    ),
    ("zero_optimization", "offload_param", "device"): (
        ("none", "cpu"),
        "weights on NVMe cannot be cut; use cpu",
    ),
}
# Settings that need all weights in one dtype. DeepSpeed accepts either name.
ONE_DTYPE = (
    ("zero_optimization", "stage3_use_all_reduce_for_fetch_params"),
    ("zero_optimization", "use_all_reduce_for_fetch_params"),
)
HPZ = "zero_hpz_partition_size"
FLAGS = ("wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc")
# Values that change nothing.
NEUTRAL = {"gradient_predivide_factor": 1, "sequence_parallel_size": 1}


class ZeroSettings(BaseModel, populate_by_name=True):
    """Holds the settings of ZeRO that a plan reads, in elements, with DeepSpeed's names and defaults."""

    zero_hpz_partition_size: int = 1  # ranks that share a second copy
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = Field(50_000_000, alias="stage3_prefetch_bucket_size")
    max_live_parameters: int = Field(1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: int = Field(1_000_000_000, alias="stage3_max_reuse_distance")


def resolve_ds_config(
    config: RunConfig, shape: ModelShape, world_size: int, ranks_per_node: int | None = None
) -> JsonObject:
    """Reads the DeepSpeed JSON of a run, or the shipped file of that name, and replaces every "auto".

    Args:
        ranks_per_node: None if all ranks are on one node.

    Raises:
        UserError: the file is absent or not ZeRO-3. A setting does not allow a cut. A value contradicts the run
            config, which may lack one for an "auto". DeepSpeed does not know a key or value.
    """
    if config.deepspeed is None:
        return {}
    path = find_shipped(config.deepspeed)
    model = config.model
    require(
        path.is_file(),
        f"deepspeed: {path} {'is not a file' if path.exists() else 'does not exist'}",
    )
    resolved = read_json(path, unique_keys=True)
    stored = Storage(model.frozen, dtype=DTYPES[model.dtype]).stored(shape).values()
    check_reshardable(str(path), resolved, {tensor.dtype.itemsize for tensor in stored})
    _refuse(str(path), resolved, OWNED)
    owned = _owned_values(config, shape, world_size)
    _check_known(path, resolved, {keys[0] for keys in owned})
    for keys, value in owned.items():
        _fill(path, resolved, keys, value)
    zero = resolved["zero_optimization"]
    if zero.get(HPZ) == "auto":  # useless on a single node
        zero[HPZ] = ranks_per_node if ranks_per_node and ranks_per_node < world_size else 1
    leftover = next((keys for keys, value in dotted_values(resolved) if value == "auto"), None)
    require(
        not leftover,
        f'{path}: {leftover} is "auto", but the run config has no value for it; give one',
    )
    _validate(path, resolved)
    size = ZeroSettings(**zero).zero_hpz_partition_size
    if size < 1 or world_size % size:
        raise UserError(
            f"{path}: zero_optimization.{HPZ} is {size}, which does not divide {world_size} ranks; "
            "give the number of ranks per node"
        )
    return resolved


def _owned_values(
    config: RunConfig, shape: ModelShape, world_size: int
) -> dict[tuple[str, ...], Any]:
    train = config.train
    linear_sizes = [linear.numel for _, linear in shape.linears()]
    return {
        ("train_batch_size",): train.global_batch_size,
        ("train_micro_batch_size_per_gpu",): train.micro_batch_size,
        ("gradient_accumulation_steps",): train.gradient_accumulation_steps(world_size),
        ("gradient_clipping",): train.max_grad_norm,
        ("bf16", "enabled"): config.model.dtype == "bfloat16",
        ("fp16", "enabled"): config.model.dtype == "float16",
        # With sums of LoRA gradients in bf16, scores would depend on the number of micro-batches and ranks.
        ("data_types", "grad_accum_dtype"): "fp32",
        ("communication_data_type",): "fp32",
        # The timer waits for the device at every forward pass and update. metrics.jsonl has the speed.
        ("timers", "throughput", "enabled"): False,
        ("zero_allow_untested_optimizer",): True,  # DeepSpeed calls torch's AdamW untested
        # torch's AdamW, even if the optimizer is offloaded
        ("zero_force_ds_cpu_optimizer",): False,
        # Any LoRA gradient fits a bucket of one layer's LoRA. A larger bucket means fewer reduce-scatters.
        ("zero_optimization", "reduce_bucket_size"): bucket_numel(shape, config.lora.r),
        # Two of the largest linears: the next weights arrive while the current ones are used.
        ("zero_optimization", "stage3_prefetch_bucket_size"): 2 * max(linear_sizes),
    }


def bucket_numel(shape: ModelShape, lora_rank: int) -> int:
    """Returns the elements of the gradient bucket: all of LoRA, up to MAX_BUCKET, but at least one layer's."""
    per_layer = [sum(layer.lora_numel(lora_rank)) for layer in shape.layers]
    return max(max(per_layer), min(sum(per_layer), MAX_BUCKET))


def _look_up(raw: JsonObject, keys: tuple[str, ...]) -> Any:
    value: Any = raw
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def check_reshardable(where: str, raw: JsonObject, element_sizes: Collection[int] = ()) -> None:
    """Checks that the config `where` is ZeRO-3 and works with a cut of weights that have elements of these sizes."""
    zero = raw.get("zero_optimization")
    require(
        isinstance(zero, dict) and zero.get("stage") == 3,
        f"{where}: zero_optimization.stage must be 3",
    )
    for keys, (allowed, reason) in ONLY.items():
        value = _look_up(raw, keys)
        require(value is None or value in allowed, f"{where}: {'.'.join(keys)} {value}: {reason}")
    _refuse(where, raw, REFUSED_KEYS)
    if len(element_sizes) > 1:
        sizes = " and ".join(map(str, sorted(element_sizes)))
        reason = f"an all-reduce fetches weights in one buffer, but these weights have elements of {sizes} bytes"
        _refuse(where, raw, dict.fromkeys(ONE_DTYPE, reason))


def _refuse(where: str, raw: JsonObject, refused: dict[tuple[str, ...], str]) -> None:
    for keys, reason in refused.items():
        value = _look_up(raw, keys)
        off = value in (None, False, NEUTRAL.get(keys[-1]))
        if isinstance(value, dict):
            off = value.get("device") == "none" or value.get("enabled") is False
        require(off, f"{where}: {'.'.join(keys)}: {reason}")


def _check_known(path: Path, raw: JsonObject, owned: set[str]) -> None:
    """Refuses unknown keys, which DeepSpeed ignores, and bad values, on which it fails after loading."""
    known = {*owned, *FLAGS, "steps_per_print"}
    for key, value in raw.items():
        if key not in known and (key,) not in REFUSED_KEYS | OWNED:
            raise UserError(
                f"{path}: {key} is not a setting of a run; the settings are {', '.join(sorted(known))}"
            )
        require(
            key not in FLAGS or isinstance(value, bool),
            f"{path}: {key} must be true or false, got {value!r}",
        )
        if key == "steps_per_print" and value != "auto" and (type(value) is not int or value < 1):
            raise UserError(f"{path}: {key} must be a whole number above 0, got {value!r}")


def _fill(path: Path, resolved: JsonObject, keys: tuple[str, ...], value: Any) -> None:
    section = resolved
    for key in keys[:-1]:
        section = section.setdefault(key, {})
        require(
            isinstance(section, dict), f"{path}: {key} must be a section of keys, got {section!r}"
        )
    in_json = section.get(keys[-1], "auto")
    # these change speed, not results, so the JSON may set them
    tunable = keys[0] in ("zero_optimization", "timers")
    if in_json == "auto":
        section[keys[-1]] = value
    elif in_json != value and not tunable:
        raise UserError(
            f'{path}: {".".join(keys)} is {in_json}, but the run config makes it {value}; write "auto"'
        )


def _validate(path: Path, resolved: JsonObject) -> None:
    """Makes DeepSpeed check its sections before the model is loaded. Without it only the plan's are checked."""
    sections: dict[str, type[BaseModel]] = {"zero_optimization": ZeroSettings}
    if is_new("deepspeed"):
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
        from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

        sections = {
            "zero_optimization": DeepSpeedZeroConfig,
            "bf16": DeepSpeedBF16Config,
            "fp16": DeepSpeedFP16Config,
            "timers.throughput": DeepSpeedThroughputTimerConfig,
        }
    for name, section in sections.items():
        try:
            section(**_look_up(resolved, tuple(name.split("."))))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([name, *map(str, first["loc"])])
            raise UserError(f"{path}: {where}: {first['msg']}, got {first['input']!r}") from None
