"""Writes the files of a checkpoint that transformers' Trainer must find, when the callback restores what they had."""

from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from loraprune_ds.errors import require
from loraprune_ds.model.adapters import ADAPTER
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.session.checkpoint import NO_PRUNING, PruningCheckpoint

# begin the names of files that the step replaces
REPLACED = ("global_step", "latest", "optimizer", "pytorch_model_fsdp", "scheduler", "scaler")


def check_none(folder: Path) -> None:
    """Raises UserError for a checkpoint of a Trainer under another name, without our step."""
    require(not (folder / TRAINER_STATE_NAME).is_file(), f"{folder} {NO_PRUNING}")


def check_complete(checkpoint: PruningCheckpoint, model: PeftModel) -> None:
    """Raises UserError for a checkpoint from which the Trainer cannot go on."""
    path = checkpoint.of_trainer / TRAINER_STATE_NAME
    require(
        path.is_file(),
        f"{path} is missing, and the Trainer needs it; resume from another checkpoint",
    )
    is_fp16 = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    has_scale = checkpoint.state.engine == "zero3" or checkpoint.engine.name != "zero3"
    require(
        has_scale or not is_fp16,
        f"{checkpoint.of_trainer} was saved by the engine {checkpoint.state.engine}, and has no loss scale for "
        "DeepSpeed in fp16; resume on the engine that saved it, or train in bf16",
    )


def lost(folder: Path, ranks: int) -> Path | None:
    """Returns the first rank's file of random numbers that is missing. Nothing else can bring them back."""
    names = [f"rng_state_{rank}.pth" for rank in range(ranks)]
    if ranks == 1:
        names = ["rng_state.pth"]
    return next((folder / name for name in names if not (folder / name).is_file()), None)


def write_stand_in(
    checkpoint: PruningCheckpoint, model: PeftModel, folder: Path, comm: Communicator
) -> None:
    """Fills an empty folder, on each rank its own, from which a Trainer goes on with the engine of `checkpoint`."""
    _write_state(checkpoint, model, folder, comm)
    for path in checkpoint.of_trainer.iterdir():
        link = folder / path.name
        if not (path.name.startswith(REPLACED) or link.exists()):
            link.symlink_to(path.resolve())
    # a schedule that changes nothing. One of several schedules has their states, too
    schedule = checkpoint.resume_state().schedule
    several = {key: value for key, value in schedule.items() if key == "_schedulers"}
    torch.save({"lr_lambdas": [None]} | several, folder / SCHEDULER_NAME)


def _write_state(
    checkpoint: PruningCheckpoint, model: PeftModel, folder: Path, comm: Communicator
) -> None:
    """Writes what changes no weight and no state of the optimizer.

    Without an optimizer's file the Trainer reads no other state. DeepSpeed needs files of the same ranks.
    """
    engine = checkpoint.engine.name
    if engine == "zero3":
        # DeepSpeed, once it trains
        from loraprune_ds.zero.external_engine import write_stand_in

        resume = checkpoint.resume_state()
        write_stand_in(folder, checkpoint.state.step, resume.groups, resume.loss_scale, comm)
    elif engine == "fsdp2":
        # accelerate's two kinds of state
        torch.save({}, folder / "pytorch_model_fsdp.bin")
        lora = {"model": get_peft_model_state_dict(model, adapter_name=ADAPTER)}
        save(lora, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    else:
        model.save_pretrained(str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False)
