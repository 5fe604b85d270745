"""Decides which weights ZeRO-3 frees after a module, like DeepSpeed, but from a list of uses.

A weight stays if the recorded pass uses it again within `stage3_max_reuse_distance` elements. DeepSpeed walks over the
rest of the record for every decision, so the second step of a run with 30 layers took half a minute. One difference:
DeepSpeed looks for uses inside every module of one that is gathered as one. Here a module uses the parameters that are
gathered for it.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.utils import z3_leaf_module
from torch import nn

# DeepSpeed's parameters have attributes that torch's lack
iter_params: Any = partitioned_param_coordinator.iter_params
LISTED = "_loraprune_listed"


class Releases:
    """Replaces a method of DeepSpeed's parameter coordinator. Like that method, it caches every decision."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._decided: dict[tuple[nn.Module, int], set[int]] = {}
        self._record: Sequence[nn.Module] | None = None  # whose uses are listed
        self._before: list[int] = []  # elements before each of its modules
        self._positions: dict[int, list[int]] = {}  # of the modules that use a parameter

    def __call__(self, module: nn.Module, step: int) -> set[int]:
        """Returns the ids of the parameters to free after `module`, the `step`-th of a pass."""
        if (module, step) not in self._decided:
            self._decided[module, step] = self._decide(module, step)
        return self._decided[module, step]

    def _decide(self, module: nn.Module, step: int) -> set[int]:
        coordinator = self._coordinator
        record = coordinator._PartitionedParameterCoordinator__submodule_order
        reach = coordinator._PartitionedParameterCoordinator__max_reuse_dist_in_numel
        fetched_for = (
            coordinator._PartitionedParameterCoordinator__most_recent_step_id_param_fetched_for
        )
        if self._record is not record:
            self._list_uses(record)
        freed: set[int] = set()
        for parameter in fetched_by(module):
            stays = parameter.ds_persist or fetched_for[parameter] > step
            if not stays and not self._is_used(parameter.ds_id, step, reach):
                freed.add(parameter.ds_id)
        return freed

    def sizes_changed(self) -> None:
        """Makes new decisions use the current sizes."""
        self._record = None

    def _list_uses(self, record: Sequence[nn.Module]) -> None:
        self._record = record
        self._before = []
        self._positions = defaultdict(list)
        numel = 0
        for position, module in enumerate(record):
            self._before.append(numel)
            for parameter in fetched_by(module):
                self._positions[parameter.ds_id].append(position)
                numel += parameter.ds_numel
        self._before.append(numel)

    def _is_used(self, parameter_id: int, step: int, reach: int) -> bool:
        """Returns True if a module from position `step` on uses the parameter, less than `reach` elements away."""
        positions = self._positions[parameter_id]
        index = bisect_left(positions, step)
        if index == len(positions):
            return False
        return self._before[positions[index]] - self._before[step] < reach


def fetched_by(module: nn.Module) -> Iterator[Any]:
    """Yields the parameters that are gathered for a module: its own, or all inside if it is gathered as one."""
    return listed_once(module, z3_leaf_module(module))


def listed_once(module: nn.Module, recurse: bool = False) -> Iterator[Any]:
    """Yields a module's parameters as DeepSpeed does, but walks through a module that is gathered as one only once."""
    # DeepSpeed asks four times per pass, which took 8 % of the host's time. A cut keeps the parameter objects.
    if not (recurse and z3_leaf_module(module)):
        return iter_params(module, recurse=recurse)
    if LISTED not in module.__dict__:
        module.__dict__[LISTED] = list(module.parameters())
    external = cast(Any, module).ds_external_parameters()
    return chain(module.__dict__[LISTED], (parameter for _, parameter in external))


def decide_releases(coordinator: Any) -> Releases:
    """Installs a `Releases` in a live coordinator. Returns it."""
    partitioned_param_coordinator.iter_params = listed_once
    releases = Releases(coordinator)
    coordinator._PartitionedParameterCoordinator__params_to_release = releases
    return releases
