"""Names the files of a checkpoint that transformers' Trainer reads, and tells which of them a folder lacks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraprune_ds.errors import require
from loraprune_ds.model.weight_files import ADAPTER_WEIGHTS

TRAINER_STATE = "trainer_state.json"  # the last file that a Trainer writes


@dataclass(frozen=True)
class TrainerFiles:
    """Describes what one Trainer reads.

    Attributes:
        ds_config: DeepSpeed's JSON, if it trains.
    """

    ds_config: dict[str, Any] | None = None

    def check_readable(self, folder: Path) -> None:
        """Raises UserError if the Trainer could not load a checkpoint at all. DeepSpeed has LoRA in its own files."""
        needed = [TRAINER_STATE] if self.ds_config else [TRAINER_STATE, ADAPTER_WEIGHTS]
        for name in needed:
            path = folder / name
            require(path.is_file(), f"{path} is missing, and the Trainer needs it; resume from another checkpoint")
