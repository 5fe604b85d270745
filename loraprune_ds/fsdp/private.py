"""The list of torch internals that a cut under FSDP2 relies on. Every start checks it.

FSDP2 has no public call that changes the shape of a sharded parameter. This package uses no other private names of it.
The sources of torch 2.8 to 2.13 have all of them, and only 2.13 was run. In 2.7 a unit may hold one dtype alone.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils import swap_tensors

from loraprune_ds.errors import require

# The constructor has these arguments in all versions, and keeps them under other names.
ARGUMENTS = (
    "param",
    "module_info",
    "mesh_info",
    "post_forward_mesh_info",
    "device",
    "shard_placement_fn",
    "mp_policy",
    "offload_policy",
)
NAMES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (
        FSDPParam,
        (
            "sharded_param",
            "_module_info",
            "mesh_info",
            "post_forward_mesh_info",
            "device",
            "mp_policy",
            "offload_to_cpu",
            "pin_memory",
            "orig_dtype",  # from the first forward pass on
            "_post_load_hook_handle",
            "_param_fqn",
            "_setattr_on_modules",
            "reset_sharded_param",
            "init_dtype_attrs",
        ),
    ),
    (FSDPParamGroup, ("fsdp_params",)),
    # 2.8 to 2.11 have one group. 2.12 has several, and keeps the older name where there is one.
    (FSDPState, ("_fsdp_param_group", "_state_ctx", "iter_forward_root")),
    (FSDPModule, ("_get_fsdp_state",)),
)
SEVERAL_GROUPS = "_fsdp_param_groups"


def check_private_attributes() -> None:
    """Compares the installed torch with the list above. Raises UserError with its version and what is missing."""
    missing = [
        f"{cls.__name__}.{name}"
        for cls, names in NAMES
        for name in names
        if name not in _mentioned(cls)
    ]
    arguments = tuple(inspect.signature(FSDPParam).parameters)
    missing += [f"FSDPParam({name})" for name in ARGUMENTS if name not in arguments]
    require(
        not missing,
        f"torch {torch.__version__} lacks names that pruning under FSDP2 needs ({', '.join(missing)}); "
        "install torch 2.8 to 2.13",
    )


def _mentioned(cls: type) -> set[str]:
    """Returns what a class defines, and the attributes that the code of its methods names."""
    names = set(dir(cls))
    for member in vars(cls).values():
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        names.update(code.co_names if code else ())
    return names


@dataclass(frozen=True)
class Slot:
    """A place in FSDP2's lists of parameters: the parameters that a unit gathers together, and an index."""

    params: list[Any]  # FSDPParam
    index: int

    @property
    def param(self) -> Any:
        return self.params[self.index]


def find_slots(units: Iterable[FSDPModule]) -> dict[nn.Parameter, Slot]:
    """Finds the slot of each parameter. All units must be sharded."""
    slots: dict[nn.Parameter, Slot] = {}
    for unit in units:
        state = cast(Any, unit)._get_fsdp_state()
        groups = getattr(state, SEVERAL_GROUPS, None) or [state._fsdp_param_group]
        for group in filter(None, groups):  # a unit may have no parameters
            params = group.fsdp_params
            slots |= {param.sharded_param: Slot(params, i) for i, param in enumerate(params)}
    return slots


def close_forward(units: Iterable[FSDPModule]) -> None:
    """Ends a forward pass that was stopped. Otherwise the next one would not wait for new weights."""
    for unit in units:
        cast(Any, unit)._get_fsdp_state()._state_ctx.iter_forward_root = None


def install(slot: Slot, parameter: nn.Parameter, local: Tensor, shape: tuple[int, ...]) -> None:
    """Gives a sharded parameter another shape, and `local` as this rank's rows. It stays the same object.

    So the optimizer, its groups, the modules and a trainer's lists keep it. FSDP2 goes through the same steps when it
    shards a model on the meta device and loads its weights.
    """
    old = slot.param
    old._post_load_hook_handle.remove()
    meta = torch.empty(shape, dtype=parameter.dtype, device="meta")
    offload = CPUOffloadPolicy(pin_memory=old.pin_memory) if old.offload_to_cpu else OffloadPolicy()
    new = FSDPParam(
        param=nn.Parameter(meta, parameter.requires_grad),
        module_info=old._module_info,
        mesh_info=old.mesh_info,
        post_forward_mesh_info=old.post_forward_mesh_info,
        device=old.device,
        shard_placement_fn=None,
        mp_policy=old.mp_policy,
        offload_policy=offload,
    )
    sharded = nn.Parameter(like_parameter(local, parameter, shape), parameter.requires_grad)
    swap_tensors(parameter, sharded)
    new.sharded_param = parameter
    new._setattr_on_modules(parameter)
    new.reset_sharded_param()  # pads and pins the rows
    if hasattr(old, "orig_dtype"):
        new.init_dtype_attrs(old.mp_policy)
    new._param_fqn = old._param_fqn
    slot.params[slot.index] = new


def like_parameter(local: Tensor, parameter: Any, shape: tuple[int, ...]) -> DTensor:
    """Returns a tensor of `shape`, placed as a parameter is. `local` holds this rank's rows."""
    strides = torch.empty(shape, device="meta").stride()
    meta = TensorMeta(torch.Size(shape), strides, local.dtype)
    spec = DTensorSpec(parameter.device_mesh, parameter.placements, meta)
    # `from_local` would move rows that are offloaded to the device
    return cast(Any, DTensor)(local, spec, requires_grad=False)
