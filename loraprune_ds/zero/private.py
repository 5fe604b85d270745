"""The exact list of DeepSpeed internals that shrinking a live ZeRO-3 engine relies on, and the check at start.

DeepSpeed has no public call that changes the shape of a partitioned parameter. Everything in this package that
touches private state stays within these names; a DeepSpeed that lacks one is refused before any work starts.
"""

import deepspeed
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from loraprune_ds.errors import UserError

OPTIMIZER_METHODS = (
    "_create_fp16_partitions_with_defragmentation",
    "_setup_for_real_optimizer",
    "set_grad_positions",
    "get_param_id",
    "get_local_fp32_param",
    "get_local_fp32_grad_for_param",
    "zero_grad",
)
# Lists that describe the flat partition; emptied before the optimizer lays it out anew.
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
    "sub_group_process_groups",
    "sub_group_partition_counts",
)
OPTIMIZER_ATTRIBUTES = (
    *FLAT_LISTS,
    "sub_group_to_group_id",
    "trainable_param_groups",
    "grad_position",
    "averaged_gradients",
    "parameter_offload",
    "persistent_parameters",
    "ipg_buckets",
)
OFFLOAD_METHODS = ("mark_persistent_parameters", "get_param_coordinator")
COORDINATOR_METHODS = ("is_invalid_trace", "_invalidate_trace")
INIT_METHODS = ("_convert_to_deepspeed_param", "_enable_mem_efficient_linear")
PARAMETER_ATTRIBUTES = (
    "ds_shape",
    "ds_numel",
    "ds_tensor",
    "ds_status",
    "ds_persist",
    "ds_active_sub_modules",
    "ds_process_group",
    "ds_secondary_tensor",
    "ds_id",
)


def check_private_attributes() -> None:
    """Compares the installed DeepSpeed with the list above.

    Raises:
        UserError: a name is missing; it names DeepSpeed's version and what is missing.
    """
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in (
            (DeepSpeedZeroOptimizer_Stage3, OPTIMIZER_METHODS),
            (DeepSpeedZeRoOffload, OFFLOAD_METHODS),
            (PartitionedParameterCoordinator, COORDINATOR_METHODS),
            (Init, INIT_METHODS),
        )
        for name in names
        if not hasattr(cls, name)
    ]
    # Instance attributes exist only on a live engine; the names a constructor assigns are in its code object.
    assigned = DeepSpeedZeroOptimizer_Stage3.__init__.__code__.co_names
    missing += [f"DeepSpeedZeroOptimizer_Stage3.{name}" for name in OPTIMIZER_ATTRIBUTES if name not in assigned]
    assigned = Init._convert_to_deepspeed_param.__code__.co_names if hasattr(Init, INIT_METHODS[0]) else ()
    missing += [f"Parameter.{name}" for name in PARAMETER_ATTRIBUTES if name not in assigned]
    if missing:
        raise UserError(
            f"deepspeed {deepspeed.__version__} lacks what in-place pruning relies on ({', '.join(missing)}); "
            "install a version that pyproject.toml allows"
        )
