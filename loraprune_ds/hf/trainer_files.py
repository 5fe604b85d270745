"""Names the files of a checkpoint that transformers' Trainer reads, and tells which of them a folder lacks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from loraprune_ds.engine.live import LiveEngine
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject
from loraprune_ds.model.adapters import ADAPTER
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session.checkpoint import NO_PRUNING, PruningCheckpoint

# accelerate's kinds of state under FSDP2, and the names of the model's and the optimizer's
OF_FSDP = {
    "FULL_STATE_DICT": ("pytorch_model_fsdp.bin", "optimizer.bin"),
    "SHARDED_STATE_DICT": ("pytorch_model_fsdp_0", "optimizer_0"),
}
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

    def check_none(self, folder: Path) -> None:
        """Raises UserError for a checkpoint of a Trainer under another name, without our step."""
        require(not (folder / TRAINER_STATE_NAME).is_file(), f"{folder} {NO_PRUNING}")

    def lacking(self, folder: Path, rank: int, engine: LiveEngine) -> list[str]:
        """Names the missing files of LoRA, the optimizer and its schedule. Without one of them all must be restored.

        Raises:
            UserError: the Trainer cannot load the checkpoint at all.
        """
        path = folder / TRAINER_STATE_NAME
        require(
            path.is_file(),
            f"{path} is missing, and the Trainer needs it; resume from another checkpoint",
        )
        lacking = _lacking(folder, rank, engine)
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
        _write_state(checkpoint, model, folder, comm)
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


def _lacking(folder: Path, rank: int, engine: LiveEngine) -> list[str]:
    """Names what a checkpoint lacks of the optimizer's state for this rank."""
    if engine.name == "zero3":
        # DeepSpeed, once it trains
        from loraprune_ds.zero.external_engine import can_load

        return [] if can_load(folder, rank) else ["complete global_step*"]
    names = ADAPTER_WEIGHTS, OPTIMIZER_NAME
    if engine.name == "fsdp2":
        plugin: Any = AcceleratorState().fsdp_plugin
        names = OF_FSDP[plugin.state_dict_type.name]
    return [name for name in names if not (folder / name).exists()]


def _write_state(
    checkpoint: PruningCheckpoint, model: PeftModel, folder: Path, comm: Communicator
) -> None:
    """Writes what a Trainer must find before a callback can restore the state. It changes no weight and no moment.

    Without an optimizer's file the Trainer reads no other state. DeepSpeed needs files of the same ranks.
    """
    engine = checkpoint.engine.name
    if engine == "zero3":
        from loraprune_ds.zero.external_engine import write_stand_in

        groups = checkpoint.resume_state().groups
        write_stand_in(folder, checkpoint.state.step, groups, comm)
    elif engine == "fsdp2":
        (full, _), (sharded, _) = OF_FSDP.values()
        torch.save({}, folder / full)
        lora = {"model": get_peft_model_state_dict(model, adapter_name=ADAPTER)}
        save(lora, checkpoint_id=folder / sharded, no_dist=True)
    else:
        model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
