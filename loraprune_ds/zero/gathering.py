"""Changes what ZeRO-3 gathers when: a module once for several passes, or all in another order."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

OF_ALL_PASSES = -1  # no module's number


def forget_trace(zero_optimizer: Any) -> None:
    """Makes ZeRO-3 record the order of modules again, by which it prefetches."""
    coordinator = zero_optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()


@contextmanager
def gather_once(coordinator: Any, modules: Sequence[nn.Module]) -> Generator[None]:
    """Keeps what ZeRO-3 gathers in the first pass, because another module seems to use it."""
    parameters: list[Any] = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.ds_active_sub_modules.add(OF_ALL_PASSES)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.ds_active_sub_modules.discard(OF_ALL_PASSES)
        for module in modules:
            coordinator.release_and_reset_all(module)
