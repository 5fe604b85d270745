"""Frees what an engine holds once nothing more is asked of it, so that another model has room."""

from typing import Any

from loraprune_ds.zero.device import accelerator, empty_host_cache


def release(engine: Any) -> None:
    """Gives up the weights and all that an optimizer has beside them; the engine is of no use afterwards.

    To let go of the engine frees nothing: DeepSpeed refers to every module it has run in a list of the process and in
    a cache of a class, and every parameter refers to the optimizer. So it is their memory that goes.
    """
    engine.empty_partition_cache()
    engine.destroy()  # the hooks; waits for the device
    for parameter in engine.module.parameters():
        state: Any = parameter
        state.ds_tensor.data = state.ds_tensor.new_empty(0)
        state.ds_secondary_tensor = None
    zero = engine.optimizer
    if inner := vars(zero).get("optimizer"):  # none in an engine that only evaluates
        inner.state.clear()
    vars(zero).clear()  # masters, gradients, buckets and flat copies, whatever their names
    accelerator().empty_cache()
    empty_host_cache()
