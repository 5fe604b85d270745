"""DeepSpeed's JSON. This module fills in the settings of the run config, which are "auto" in the JSON.

It needs no DeepSpeed, so a plan needs none. A name such as `fp16.enabled` is a key in a section.
"""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import dotted_values, find_shipped
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject, read_json
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.storage import Storage

MAX_BUCKET = 50_000_000  # elements. Every rank allocates a full reduce bucket
ZERO = "zero_optimization"
Sections = Mapping[str, type[BaseModel]]
HPZ = "zero_hpz_partition_size"

# Settings that the run config owns.
OWNED = {
    "optimizer": "the run config owns the optimizer (train.learning_rate, train.adam_*)",
    "scheduler": "the run config owns the schedule (train.lr_scheduler, train.warmup_steps)",
    "elasticity": "the run config owns the batch sizes (train.global_batch_size, train.micro_batch_size)",
    "curriculum_learning": "the run config owns the data (data.window)",
    "data_efficiency": "the run config owns the data",
}
# Settings that cannot work with a cut, in any trainer.
REFUSED = {
    "torch_autocast": "weights have model.dtype; autocast is not supported",
    "amp": "weights have model.dtype; apex is not supported",
    "zero_optimization.cpu_offload": "removed from DeepSpeed; write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "removed from DeepSpeed; write offload_param: {device: cpu}",
    "zero_optimization.mics_shard_size": "removed from DeepSpeed; use hpZ (zero_hpz_partition_size)",
    "zero_optimization.zero_quantized_weights": "quantized weights have no flat shards to reshard",
    "zero_optimization.zero_quantized_nontrainable_weights": "quantized weights cannot be resharded",
    "zero_optimization.zero_quantized_gradients": "scores need the exact LoRA gradients",
    "zero_optimization.zenflow": "ZenFlow is not supported",
    "zero_optimization.stage3_module_granularity_threshold": "modules gathered whole are not supported",
    "zero_optimization.module_granularity_threshold": "modules gathered whole are not supported",
    "zero_optimization.offload_optimizer.device": "masters and moments on NVMe cannot be cut; use cpu",
    "zero_optimization.offload_optimizer.ratio": "partial offload would need a second optimizer; offload all of it",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload has its own optimizer, "
    "whose state cannot be resharded",
    "zero_optimization.offload_param.device": "weights on NVMe cannot be cut; use cpu",
    "bf16.bf16_master_weights_and_grads": "LoRA's masters and gradients are fp32",
    "bf16.bf16_optimizer_states": "Adam's moments are fp32",
    "fp16.fp16_master_weights_and_grads": "LoRA's masters and gradients are fp32",
    "prescale_gradients": "DeepSpeed's ZeRO-3 has no prescaled gradients",
    "gradient_predivide_factor": "DeepSpeed's ZeRO-3 has no predivided gradients",
    "sequence_parallel_size": "every rank reads complete samples; sequence parallelism is not supported",
    "expert_parallel": "AutoEP spreads experts over ranks; ZeRO-3 shards them, and cuts its shards",
    "compile.deepcompile": "DeepCompile keeps the sizes from before a cut",
    "checkpoint.load_universal": "a universal checkpoint has the dense sizes; go on with --resume or resume()",
    "tensor_parallel": "linears split over ranks are not supported; ZeRO-3 shards them",
    "compression_training": "DeepSpeed's own compression is not supported",
    "progressive_layer_drop": "dropping layers at random is not supported",
}
# Settings that need all weights in one dtype. DeepSpeed accepts either name.
ONE_DTYPE = (
    "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.use_all_reduce_for_fetch_params",
)
# The values that work. All other settings of the tables must be off.
OFF = (False,)  # and 0, which Python takes for the same
WORKING: dict[str, tuple[Any, ...]] = {
    "zero_optimization.offload_optimizer.device": ("none", "cpu"),
    "zero_optimization.offload_optimizer.ratio": (1,),
    "zero_optimization.offload_param.device": ("none", "cpu"),
    "gradient_predivide_factor": (1,),
    "sequence_parallel_size": (1,),
}
# Their values change speed, not results, so the JSON may set them.
TUNABLE = ("zero_optimization.", "timers.")


class ZeroSettings(BaseModel, populate_by_name=True):
    """Holds the settings of ZeRO that a plan reads, in elements, with DeepSpeed's names and defaults."""

    zero_hpz_partition_size: int = 1  # ranks that share a second copy
    reduce_bucket_size: int = 500_000_000
    prefetch_bucket_size: int = Field(50_000_000, alias="stage3_prefetch_bucket_size")
    max_live_parameters: int = Field(1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: int = Field(1_000_000_000, alias="stage3_max_reuse_distance")


class TopLevel(BaseModel, strict=True):
    """Holds the settings beside the sections that a run leaves to the JSON."""

    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    steps_per_print: int = Field(1, gt=0)


def resolve_ds_config(
    config: RunConfig, shape: ModelShape, sections: Sections, world_size: int, ranks_per_node: int
) -> JsonObject:
    """Reads the DeepSpeed JSON of a run, or the shipped file of that name, and replaces every "auto".

    Args:
        sections: DeepSpeed's classes that check them. A plan's settings are checked without these, too.
        ranks_per_node: of the node with the most.

    Raises:
        UserError: the file is absent or not ZeRO-3. A setting does not allow a cut. A value contradicts the run
            config, which may lack one for an "auto". DeepSpeed does not know a key or value.
    """
    if config.deepspeed is None:
        return {}
    path = find_shipped(config.deepspeed)
    where = str(path)
    require(path.is_file(), f"deepspeed: {path} is no file")
    resolved = read_json(path, unique_keys=True)
    model = config.model
    stored = Storage(model.frozen, dtype=DTYPES[model.dtype]).stored(shape).values()
    check_reshardable(where, resolved, {tensor.dtype.itemsize for tensor in stored})
    _refuse(where, resolved, OWNED)
    owned = _owned_values(config, shape, world_size)
    known = {key.partition(".")[0] for key in (*owned, *TopLevel.model_fields)}
    settings = ", ".join(sorted(known))
    for key in resolved:
        require(
            key in known | REFUSED.keys() | OWNED.keys(),
            f"{where}: {key} is not a setting of a run; the settings are {settings}",
        )
    for key, value in owned.items():
        _fill(where, resolved, key, value)
    zero = resolved[ZERO]
    if zero.get(HPZ) == "auto":  # useless on a single node
        zero[HPZ] = ranks_per_node if ranks_per_node < world_size else 1
    for key, value in dotted_values(resolved):
        require(
            value != "auto",
            f'{where}: {key} is "auto", but the run config has no value for it; give one',
        )
    _check(where, "", TopLevel, resolved)
    for name, section in {ZERO: ZeroSettings, **sections}.items():
        _check(where, f"{name}.", section, _look_up(resolved, name))
    size = ZeroSettings(**zero).zero_hpz_partition_size
    key = f"{ZERO}.{HPZ}"
    require(
        size > 0 and world_size % size == 0,
        f"{where}: {key} is {size}, which does not divide {world_size} ranks; "
        "give the number of ranks per node",
    )
    return resolved


def _owned_values(config: RunConfig, shape: ModelShape, world_size: int) -> dict[str, Any]:
    train = config.train
    linear_sizes = [linear.numel for _, linear in shape.linears()]
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.gradient_accumulation_steps(world_size),
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": config.model.dtype == "bfloat16",
        "fp16.enabled": config.model.dtype == "float16",
        # With sums of LoRA gradients in bf16, scores would depend on the number of micro-batches and ranks.
        "data_types.grad_accum_dtype": "fp32",
        "communication_data_type": "fp32",
        # The timer waits for the device at every forward pass and update. metrics.jsonl has the speed.
        "timers.throughput.enabled": False,
        "zero_allow_untested_optimizer": True,  # DeepSpeed calls torch's AdamW untested
        # torch's AdamW, even if the optimizer is offloaded
        "zero_force_ds_cpu_optimizer": False,
        # Any LoRA gradient fits a bucket of one layer's LoRA. A larger bucket means fewer reduce-scatters.
        "zero_optimization.reduce_bucket_size": bucket_numel(shape, config.lora.r),
        # Two of the largest linears: the next weights arrive while the current ones are used.
        "zero_optimization.stage3_prefetch_bucket_size": 2 * max(linear_sizes),
    }


def bucket_numel(shape: ModelShape, lora_rank: int) -> int:
    """Returns the elements of the gradient bucket: all of LoRA, up to MAX_BUCKET, but at least one layer's."""
    per_layer = [sum(layer.lora_numel(lora_rank)) for layer in shape.layers]
    return max(max(per_layer), min(sum(per_layer), MAX_BUCKET))


def _look_up(raw: JsonObject, key: str) -> Any:
    value: Any = raw
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def check_reshardable(where: str, raw: JsonObject, element_sizes: Collection[int] = ()) -> None:
    """Checks that the config `where` is ZeRO-3 and works with a cut of weights that have elements of these sizes."""
    require(_look_up(raw, "zero_optimization.stage") == 3, f"{where}: {ZERO}.stage must be 3")
    _refuse(where, raw, REFUSED)
    if len(element_sizes) > 1:
        sizes = " and ".join(map(str, sorted(element_sizes)))
        reason = f"an all-reduce fetches weights in one buffer, but these weights have elements of {sizes} bytes"
        _refuse(where, raw, dict.fromkeys(ONE_DTYPE, reason))


def _refuse(where: str, raw: JsonObject, reasons: Mapping[str, str]) -> None:
    for key, reason in reasons.items():
        value = _look_up(raw, key)
        works = value is None or value in WORKING.get(key, OFF)
        if isinstance(value, dict):
            works = value.get("device") == "none" or value.get("enabled") is False
        require(works, f"{where}: {key} {value!r:.40}: {reason}")


def _fill(where: str, resolved: JsonObject, key: str, value: Any) -> None:
    *names, last = key.split(".")
    section = resolved
    for name in names:
        section = section.setdefault(name, {})
        require(
            isinstance(section, dict), f"{where}: {name} must be a section of keys, got {section!r}"
        )
    given = section.get(last, "auto")
    if given == "auto":
        section[last] = value
    require(
        given in ("auto", value) or key.startswith(TUNABLE),
        f'{where}: {key} is {given}, but the run config makes it {value}; write "auto"',
    )


def _check(where: str, prefix: str, section: type[BaseModel], values: JsonObject) -> None:
    try:
        section(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key}: {first['msg']}, got {first['input']!r}") from None
