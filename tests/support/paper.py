"""The paper's way of pruning, for tests of one part of the method. Without it a run prunes by the default recipe."""

from typing import Any

PAPER: Any = {"criterion": "lora", "ranking": "uniform", "normalize": "l2", "compensate": "none"}
PAPER |= {"protected_first": None, "protected_last": 1}
