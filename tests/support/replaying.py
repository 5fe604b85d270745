"""Counts what ZeRO-3 gathers while a refit repeats passes."""

import torch

from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.pruning.replay import refit_by_replay
from loraprune_ds.pruning.step import all_groups
from tests.support.cutting import recorded_collectives
from tests.support.driver import Job, build


def gathers_of_replays(job: Job, *kept: list[int]) -> list[list[tuple[str, int]]]:
    """Refits by the passes of one step, then of two. Returns the all-gathers of each."""
    trainer = build(job)
    for step in (1, 2):
        trainer.step(step)
    passes = trainer.pruner.passes
    assert passes is not None
    kinds = trainer.model.shape.kinds
    keep = [
        LayerKeep(zip(kinds, map(torch.tensor, kept), strict=True))
        for _ in all_groups(trainer.model.shape)
    ]
    both = passes.passes()
    gathers: list[list[tuple[str, int]]] = []
    for part in (both[: len(both) // 2], both):
        with recorded_collectives() as collectives:
            refit_by_replay(trainer.model, keep, part, 2)
        gathers.append([call for call in collectives if "gather" in call[0]])
    return gathers
