"""Decides which weights ZeRO-3 frees after a module. It decides as DeepSpeed does, but by looking uses up.

A weight stays if the recorded pass uses it again within `stage3_max_reuse_distance` elements. For every decision
DeepSpeed walks over the record from there on. That is quadratic in the modules. It made the second step of every run
half a minute long with 30 layers. Here the uses of each weight are listed once.

One thing is decided differently. For a module that is gathered whole DeepSpeed looks for uses inside of every module on
the way, the whole model's included. Here a module uses what is gathered for it.

Which parameters those are is listed once, too.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, cast

from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.utils import z3_leaf_module
from torch import nn

iter_params: Any = partitioned_param_coordinator.iter_params  # its parameters have attributes that torch's lack
LISTED = "_loraprune_listed"


class Releases:
    """Takes the place of a method of DeepSpeed's parameter coordinator. Like that, it remembers every decision."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._decided: dict[tuple[nn.Module, int], set[int]] = {}
        self._uses: _Uses | None = None
        self._record: Sequence[nn.Module] = ()

    def __call__(self, module: nn.Module, step: int) -> set[int]:
        """Returns the ids of the parameters that are freed after `module`, the `step`-th of a pass."""
        if (module, step) not in self._decided:
            self._decided[module, step] = self._decide(module, step)
        return self._decided[module, step]

    def sizes_changed(self) -> None:
        """Has coming decisions go by the sizes of now."""
        self._uses = None

    def _decide(self, module: nn.Module, step: int) -> set[int]:
        uses = self._uses_in_record()
        reach = self._coordinator._PartitionedParameterCoordinator__max_reuse_dist_in_numel
        fetched_for = self._coordinator._PartitionedParameterCoordinator__most_recent_step_id_param_fetched_for
        return {
            parameter.ds_id
            for parameter in fetched_by(module)
            if not parameter.ds_persist
            and fetched_for[parameter] <= step
            and not uses.come_within(reach, parameter.ds_id, step)
        }

    def _uses_in_record(self) -> "_Uses":
        record = self._coordinator._PartitionedParameterCoordinator__submodule_order
        if self._uses is None or record is not self._record:
            self._record, self._uses = record, _Uses(record)
        return self._uses


def fetched_by(module: nn.Module) -> Iterator[Any]:
    """Yields the parameters that are gathered for a module: its own, or all inside it if it is gathered whole."""
    return listed_once(module, z3_leaf_module(module))


def listed_once(module: nn.Module, recurse: bool = False) -> Iterator[Any]:
    """Yields a module's parameters as DeepSpeed does. It walks through a module that is gathered whole only once.

    DeepSpeed asks twice per fetch and twice per release. With a decoder layer that was 8 % of the host's time. The
    objects are those of the first call. A cut changes what they hold and not which there are.
    """
    if not (recurse and z3_leaf_module(module)):
        return iter_params(module, recurse=recurse)
    if LISTED not in module.__dict__:
        module.__dict__[LISTED] = list(module.parameters())
    external = cast(Any, module).ds_external_parameters()
    return chain(module.__dict__[LISTED], (parameter for _, parameter in external))


class _Uses:
    """Holds where a recorded pass uses each parameter, and how many elements come before each of its modules."""

    def __init__(self, record: Sequence[nn.Module]) -> None:
        self._before = [0]
        self._positions: dict[int, list[int]] = defaultdict(list)
        for position, module in enumerate(record):
            numel = 0
            for parameter in fetched_by(module):
                self._positions[parameter.ds_id].append(position)
                numel += parameter.ds_numel
            self._before.append(self._before[-1] + numel)

    def come_within(self, reach: int, parameter_id: int, step: int) -> bool:
        """Tells if a module from position `step` on uses the parameter, less than `reach` elements away."""
        positions = self._positions[parameter_id]
        later = bisect_left(positions, step)
        return later < len(positions) and self._before[positions[later]] - self._before[step] < reach


def decide_releases(coordinator: Any) -> Releases:
    """Has a live coordinator ask `Releases`. Returns it."""
    partitioned_param_coordinator.iter_params = listed_once
    releases = Releases(coordinator)
    coordinator._PartitionedParameterCoordinator__params_to_release = releases
    return releases
