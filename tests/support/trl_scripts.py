"""Runs TRL's own scripts, alone or through our command, in processes that other tests use, too."""

import os
from importlib import import_module
from unittest.mock import patch

import torch
from accelerate.state import PartialState
from transformers import Trainer

from loraprune_ds.hf.trl import main
from tests.support.refusals import refused
from tests.support.trainers import fresh_accelerate


def run_script(arguments: list[str], deepspeed: bool = False) -> None:
    """Trains to the end. `deepspeed`: on CPU ranks, which accelerate itself takes for one process."""
    with (
        fresh_accelerate(),
        patch.object(Trainer, "__init__", Trainer.__init__),
        # TRL ends the group of the ranks, which later tests need
        patch.object(torch.distributed, "destroy_process_group"),
    ):
        if deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            PartialState(backend="gloo")
        main(arguments)


def run_plain(arguments: list[str]) -> None:
    """Trains by TRL alone, as its own command does."""
    name, *options = arguments
    script = import_module(f"trl.scripts.{name}")
    with fresh_accelerate(), patch.object(torch.distributed, "destroy_process_group"):
        script.main(*script.make_parser().parse_args_and_config(options))


def refused_script(arguments: list[str]) -> str:
    return refused(run_script, arguments)
