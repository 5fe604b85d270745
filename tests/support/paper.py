"""The paper's way of pruning, for tests of one part of the method. Without it a run prunes by the default recipe."""

from typing import Any

PAPER: Any = {"criterion": "lora", "ranking": "uniform", "normalize": "l2", "compensate": "none"}
PAPER |= {"protected_first": None, "protected_last": 1}
OPEN: Any = {"protected_first": 0, "protected_last": 0}  # a cut may reach all layers
FREE: Any = OPEN | {"channel_multiple": 1}  # and leave any number of channels
