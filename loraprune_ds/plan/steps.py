"""How many steps a run of so many epochs has: the plan and the run itself count them here."""

import math


def steps_for_epochs(epochs: float, samples: int, global_batch_size: int) -> int:
    """Whole steps in so many epochs, at least one."""
    steps = epochs * samples / global_batch_size
    return max(1, math.floor(steps + 1e-9))  # 0.29 epochs of 100 samples are 29, not 28.999...
