"""Names the files of a checkpoint that transformers' Trainer reads, and tells which of them a folder lacks."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers.trainer import SCALER_NAME, SCHEDULER_NAME

from loraprune_ds.engine.live import LiveEngine
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session.checkpoint import TRAINER_STATE, PruningCheckpoint

# begin the names of files that need the same engine
OF_ENGINE = ("global_step", "latest", "optimizer", "pytorch_model_fsdp", "scheduler")


@dataclass(frozen=True)
class TrainerFiles:
    """Describes what one Trainer reads.

    Attributes:
        ds_config: DeepSpeed's JSON, if it trains.
        fp16: a loss scaler of torch trains along, if DeepSpeed does not.
    """

    ds_config: JsonObject | None = None
    fp16: bool = False

    @property
    def of_deepspeed(self) -> list[str]:
        """Names the sections by which DeepSpeed makes the optimizer or the schedule. It then saves both itself."""
        return sorted({"optimizer", "scheduler"} & (self.ds_config or {}).keys())

    def lacking(self, folder: Path, rank: int, engine: LiveEngine) -> list[str]:
        """Names the missing files of LoRA, the optimizer and its schedule. Without one of them all must be restored.

        Raises:
            UserError: the Trainer cannot load the checkpoint at all.
        """
        path = folder / TRAINER_STATE
        require(
            path.is_file(),
            f"{path} is missing, and the Trainer needs it; resume from another checkpoint",
        )
        lacking = engine.lacks_state(folder, rank)
        if not self.of_deepspeed and not (folder / SCHEDULER_NAME).is_file():
            lacking.append(SCHEDULER_NAME)
        return lacking

    def write_stand_in(
        self, checkpoint: PruningCheckpoint, model: PeftModel, folder: Path, comm: Communicator
    ) -> None:
        """Fills an empty folder, on each rank its own, from which a Trainer goes on with the engine of `checkpoint`."""
        of_trainer = checkpoint.of_trainer
        sections = " and ".join(self.of_deepspeed)
        require(
            not sections,
            f"{of_trainer} goes on here only without {sections} in the DeepSpeed config",
        )
        groups = checkpoint.resume_state().adam_groups
        checkpoint.engine.write_stand_in(folder, model, checkpoint.state.step, groups, comm)
        for path in of_trainer.iterdir():
            link = folder / path.name
            if not (path.name.startswith(OF_ENGINE) or link.exists()):
                link.symlink_to(path.resolve())
        # a schedule that changes nothing
        torch.save({"lr_lambdas": [None]}, folder / SCHEDULER_NAME)

    def lost(self, folder: Path, ranks: int) -> list[str]:
        """Says what no other file can bring back. Names the file of the first rank that has none."""
        names = [f"rng_state_{rank}.pth" for rank in range(ranks)]
        if ranks == 1:
            names = ["rng_state.pth"]
        missing = [name for name in names if not (folder / name).is_file()]
        lost = list[str]()
        if missing:
            lost.append(f"the random numbers of dropout (no {missing[0]})")
        has_scaler = self.fp16 and not self.ds_config
        if has_scaler and not (folder / SCALER_NAME).is_file():
            lost.append(f"the loss scale of fp16 (no {SCALER_NAME})")
        return lost
