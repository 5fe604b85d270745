"""Runs TRL's own scripts through our command, in processes that other tests use, too."""

import importlib
import os
from unittest.mock import patch

import torch
import trl
from accelerate.state import PartialState

from loraprune_ds.hf.trl import TRAINERS, main
from tests.support.refusals import refused
from tests.support.trainers import fresh_accelerate


def run_script(arguments: list[str], deepspeed: bool = False) -> None:
    """Trains to the end. `deepspeed`: on CPU ranks, which accelerate itself takes for one process."""
    name = TRAINERS[arguments[0]]
    kind = getattr(trl, name)
    module = importlib.import_module(kind.__module__)
    with (
        fresh_accelerate(),
        patch.object(trl, name, kind),
        patch.object(module, "get_peft_model", module.get_peft_model),
        # TRL ends the group of the ranks, which later tests need
        patch.object(torch.distributed, "destroy_process_group"),
    ):
        if deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            PartialState(backend="gloo")
        main(arguments)


def refused_script(arguments: list[str]) -> str:
    return refused(run_script, arguments)
