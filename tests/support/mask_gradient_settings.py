"""Settings of pruning where nothing changes but the masks."""

from typing import Any

from loraprune_ds.config import PruneConfig

UNCHANGED: Any = {
    "ranking": "uniform",
    "normalize": "none",
    "compensate": "none",
    "moving_average": 0.0,
}
PRUNE = PruneConfig(**UNCHANGED, ratio=0.3, protected_first=0, channel_multiple=1)
