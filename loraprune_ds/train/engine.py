"""Chooses the engine of a run. No other module of train/ knows ZeRO-3, but for DeepSpeed's JSON, or local/."""

from types import ModuleType


def find_engines(sharded: bool) -> ModuleType:
    """Returns zero/engine.py, or local/engine.py, which needs no DeepSpeed. They have the same functions."""
    if sharded:
        from loraprune_ds.zero import engine
    else:
        from loraprune_ds.local import engine
    return engine
