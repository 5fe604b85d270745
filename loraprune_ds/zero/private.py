"""The list of DeepSpeed internals that a cut relies on. Every start checks it.

DeepSpeed has no public call that changes the shape of a sharded parameter. This package uses no other private names. A
DeepSpeed that lacks one is refused before any work starts.

Four more names are only written, and cannot be checked: a parameter's `ds_numel_aligned`, a shard's `status` and
`final_location` (params.py), and `deepspeed.ops.__compatible_ops__` (engine.py).
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import groups
from torch import Tensor

from loraprune_ds.errors import require

# Lists that describe the flat buffers. They are emptied before the optimizer lays out new ones.
FLAT_LISTS = (
    "fp16_groups",
    "fp16_partitioned_groups",
    "fp16_partitioned_groups_flat",
    "fp16_partitioned_groups_flat_numel",
    "fp16_partitioned_groups_flat_id",
    "param_groups_fp16_flat_cpu_memory",
    "fp32_partitioned_groups_flat",
    "next_swappable_fp32_partitioned_groups",
    "groups_padding",
)
# before, sub-groups share a group of ranks
if (deepspeed.__version_major__, deepspeed.__version_minor__) >= (0, 19):
    FLAT_LISTS += ("sub_group_process_groups", "sub_group_partition_counts")
OPTIMIZER_METHODS = (
    "_create_fp16_partitions_with_defragmentation",
    "_setup_for_real_optimizer",
    "set_grad_positions",
    "get_param_id",
    "zero_grad",
    "step",
    "empty_partition_cache",
)
OPTIMIZER_ATTRIBUTES = (
    *FLAT_LISTS,
    "sub_group_to_group_id",
    "trainable_param_groups",
    "grad_position",
    "averaged_gradients",
    "ipg_buckets",
    "parameter_offload",
    "persistent_parameters",
    "loss_scaler",
    "dtype",
    "optimizer",
    "dp_process_group",
    "communication_data_type",
    "gradient_accumulation_dtype",
)
LAYOUT_ATTRIBUTES = (
    "grad_partitions_flat_buffer",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)
OFFLOAD_ATTRIBUTES = (
    "param_numel_persistence_threshold",
    "model_persistence_threshold",
    "persistent_parameters",
)
_MANGLED = "_PartitionedParameterCoordinator__"
COORDINATOR_ATTRIBUTES = (
    _MANGLED + "submodule_order",
    _MANGLED + "most_recent_step_id_param_fetched_for",
    _MANGLED + "max_reuse_dist_in_numel",
)
PARAMETER_ATTRIBUTES = (
    "ds_id",
    "ds_shape",
    "ds_numel",
    "ds_tensor",
    "ds_status",
    "ds_persist",
    "ds_active_sub_modules",
    "ds_secondary_tensor",
    "ds_process_group",
)
ENGINE_COUNTERS = ("global_steps", "global_samples", "micro_steps")
LOSS_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

# a static method of 0.18, a function since
DEFRAGMENTER: Any = stage3 if hasattr(stage3, "defragment") else DeepSpeedZeroOptimizer_Stage3
METHODS: tuple[tuple[type | ModuleType, tuple[str, ...]], ...] = (
    (DeepSpeedZeroOptimizer_Stage3, OPTIMIZER_METHODS),
    (DeepSpeedZeRoOffload, ("mark_persistent_parameters", "get_param_coordinator")),
    (
        PartitionedParameterCoordinator,
        (
            "is_invalid_trace",
            "_invalidate_trace",
            "release_and_reset_all",
            _MANGLED + "params_to_release",
        ),
    ),
    (partitioned_param_coordinator, ("iter_params",)),
    (DEFRAGMENTER, ("defragment",)),
    (Init, ("_convert_to_deepspeed_param",)),
    (groups, ("_get_zero_param_intra_parallel_group",)),
)
# (class, function, holder, attributes): instance attributes exist only on a live engine, but the code object of the
# function that assigns them has their names.
ASSIGNED: tuple[tuple[type | ModuleType, str, str, tuple[str, ...]], ...] = (
    (
        DeepSpeedZeroOptimizer_Stage3,
        "__init__",
        "DeepSpeedZeroOptimizer_Stage3",
        OPTIMIZER_ATTRIBUTES,
    ),
    (
        DeepSpeedZeroOptimizer_Stage3,
        "_setup_for_real_optimizer",
        "DeepSpeedZeroOptimizer_Stage3",
        LAYOUT_ATTRIBUTES,
    ),
    (DeepSpeedZeRoOffload, "__init__", "DeepSpeedZeRoOffload", OFFLOAD_ATTRIBUTES),
    (
        PartitionedParameterCoordinator,
        "__init__",
        "PartitionedParameterCoordinator",
        COORDINATOR_ATTRIBUTES,
    ),
    (DeepSpeedEngine, "__init__", "DeepSpeedEngine", ENGINE_COUNTERS),
    (DynamicLossScaler, "__init__", "DynamicLossScaler", ("dynamic",)),
    (DynamicLossScaler, "update_scale", "DynamicLossScaler", LOSS_SCALE_FIELDS),
    (partition_parameters, "_init_external_params", "Module", ("ds_external_parameters",)),
    (Init, "__init__", "Init", ("local_device", "remote_device", "pin_memory")),
    (Init, "_convert_to_deepspeed_param", "Parameter", PARAMETER_ATTRIBUTES),
)


@contextmanager
def defragmenting_on_device() -> Generator[None]:
    """Lets DeepSpeed join its LoRA shards without a copy of each to the host and back, which waits for the device."""
    original = vars(DEFRAGMENTER)["defragment"]
    DEFRAGMENTER.defragment = staticmethod(_join)
    try:
        yield
    finally:
        DEFRAGMENTER.defragment = original


def _join(tensors: Sequence[Tensor]) -> Tensor:
    flat = torch.cat(list(tensors))
    parts = torch.split(flat, [len(tensor) for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part
    return flat


def check_private_attributes() -> None:
    """Compares the installed DeepSpeed with the list above. Raises UserError with its version and what is missing."""
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in METHODS
        for name in names
        if not hasattr(cls, name)
    ]
    for cls, function, holder, names in ASSIGNED:
        code = getattr(getattr(cls, function, None), "__code__", None)
        assigned = code.co_names if code else ()
        missing += [f"{holder}.{name}" for name in names if name not in assigned]
    lacks = f"deepspeed {deepspeed.__version__} lacks names that in-place pruning needs ({', '.join(missing)})"
    require(not missing, f"{lacks}; install a version that pyproject.toml allows")
