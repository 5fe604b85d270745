"""ZeRO-3 frees the same weights as by DeepSpeed's own decision, which costs more the deeper the model."""

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import _init_external_params
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import set_z3_leaf_module, z3_leaf_module
from torch import nn

from loraprune_ds.zero import releases
from loraprune_ds.zero.releases import Releases, fetched_by, iter_params, listed_once

COORDINATOR: Any = PartitionedParameterCoordinator
FREE_AS_DEEPSPEED = COORDINATOR._PartitionedParameterCoordinator__params_to_release


class Fed(nn.Module):
    """A module with some parameters of its own, and perhaps one of another module."""

    def __init__(self, draw: random.Random, ids: Iterator[int], children: int = 0) -> None:
        super().__init__()
        for name in range(draw.randrange(3)):
            parameter: Any = nn.Parameter(torch.empty(0))
            parameter.ds_id, parameter.ds_numel = next(ids), draw.randrange(1, 50)
            parameter.ds_persist = parameter.ds_numel < 8
            self.register_parameter(str(name), parameter)
        for child in range(children):
            self.add_module(f"child{child}", Fed(draw, ids))
        _init_external_params(self)


def live_coordinator(draw: random.Random, leaves: bool, reach: int) -> tuple[Any, list[nn.Module]]:
    """Makes a coordinator in the middle of a recorded pass. Only what decides about releases is there."""
    ids = iter(range(1000))
    blocks = [Fed(draw, ids, children=draw.randrange(4)) for _ in range(6)]
    for block in blocks:
        set_z3_leaf_module(block, leaves and draw.random() < 0.5)
    modules = [module for block in blocks for module in block.modules()]
    owners = [module for module in modules if list(module.parameters(recurse=False))]
    # as a tied embedding is of the head
    other = next(draw.choice(owners).parameters(recurse=False))
    modules[-1]._external_params[id(other)] = other  # type: ignore[operator]
    record = modules + modules[::-1]
    coordinator: Any = object.__new__(PartitionedParameterCoordinator)
    coordinator._PartitionedParameterCoordinator__submodule_order = tuple(record)
    coordinator._PartitionedParameterCoordinator__max_reuse_dist_in_numel = reach
    fetched: dict[Any, int] = defaultdict(lambda: -1)
    for module in modules:
        for parameter in module.parameters(recurse=False):
            fetched[parameter] = draw.randrange(-1, len(record))
    coordinator._PartitionedParameterCoordinator__most_recent_step_id_param_fetched_for = fetched
    coordinator.is_complete_trace = lambda: True
    return coordinator, record


def walk(
    coordinator: Any, record: list[nn.Module], module: nn.Module, step: int, reach: int
) -> set[int]:
    """Decides by DeepSpeed's walk over the record, where a module uses the parameters that are gathered for it."""
    fetched = coordinator._PartitionedParameterCoordinator__most_recent_step_id_param_fetched_for
    traversed, used = 0, set[int]()
    for later in record[step:]:
        if traversed >= reach:
            break
        used |= {p.ds_id for p in fetched_by(later)}
        traversed += sum(p.ds_numel for p in fetched_by(later))
    return {p.ds_id for p in fetched_by(module) if not p.ds_persist and fetched[p] <= step} - used


@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("reach", [0, 40, 200, 10**9])
def test_every_decision_is_the_same_as_deepspeeds(reach: int, leaves: bool) -> None:
    freed = 0
    for seed in range(20):
        coordinator, record = live_coordinator(random.Random(seed), leaves, reach)
        decide = Releases(coordinator)
        for step, module in enumerate(record, 1):
            expected = walk(coordinator, record, module, step, reach)
            assert leaves or expected == FREE_AS_DEEPSPEED(coordinator, module, step)
            assert decide(module, step) == expected
            freed += len(expected)
    assert freed > 20


def test_a_module_that_is_gathered_as_one_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, record = live_coordinator(random.Random(5), True, 0)
    for recurse in (False, True):
        for module in record:
            expected = [id(parameter) for parameter in iter_params(module, recurse=recurse)]
            for _ in range(2):
                assert [id(parameter) for parameter in listed_once(module, recurse)] == expected
    whole = next(
        module for module in record if z3_leaf_module(module) and list(module.parameters())
    )
    monkeypatch.setattr(whole, "named_parameters", None)
    assert list(listed_once(whole, True))


def test_a_decision_is_remembered_and_a_new_one_knows_the_new_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator, record = live_coordinator(random.Random(3), False, 60)
    decide, again = Releases(coordinator), Releases(coordinator)
    monkeypatch.setattr(releases, "iter_params", counting := Mock(wraps=releases.iter_params))
    first = [set(decide(module, step)) for step, module in enumerate(record, 1)]
    # each module for its own decision, and once for the list
    assert counting.call_count == 2 * len(record)
    _ = again(record[0], 1)
    for module in record:
        for parameter in module.parameters(recurse=False):
            parameter.ds_numel = 1  # type: ignore[attr-defined]
    assert [decide(module, step) for step, module in enumerate(record, 1)] == first
    again.sizes_changed()
    for step, module in enumerate(record[1:], 2):
        assert again(module, step) == FREE_AS_DEEPSPEED(coordinator, module, step)
