"""Prunes in TRL's own scripts, with all of their flags and a block `loraprune: {ratio: 0.3}` in their YAML.

python -m loraprune_ds.hf.trl sft --config x.yaml
python -m loraprune_ds.hf.trl dpo --config x.yaml
"""

import sys
from importlib import import_module
from typing import Any

import trl

from loraprune_ds.config_file import read_config
from loraprune_ds.errors import require, shorten_errors
from loraprune_ds.hf.plugin import (
    BLOCK,
    OPTIMIZERS,
    PLAIN,
    TARGETS,
    LoraPruneCallback,
    check_settings,
    drive,
)

TRAINERS = {"sft": "SFTTrainer", "dpo": "DPOTrainer"}
ALLOWED = {"use_peft": (True,), "optim": OPTIMIZERS, "use_dora": PLAIN}


def main(arguments: list[str]) -> None:
    """Runs a script of TRL with a trainer that prunes."""
    shorten_errors()
    command = arguments[0] if arguments else "nothing"
    require(command in TRAINERS, f"the first argument is sft or dpo; got {command}")
    require("--config" in arguments[:-1], f"--config must name a YAML with the block {BLOCK}")
    settings = read_config(arguments[arguments.index("--config") + 1])
    script = import_module(f"trl.scripts.{command}")
    parts = script.make_parser(prog=command).parse_args_and_config(
        arguments[1:], fail_with_unknown_args=False
    )
    for part in parts:
        settings |= vars(part)
    config, linears = check_settings(settings, settings["model_name_or_path"], ALLOWED)
    for part in parts:
        if hasattr(part, TARGETS):
            setattr(part, TARGETS, linears)
    _replace(TRAINERS[command], LoraPruneCallback(config))
    script.main(*parts)


def _replace(name: str, callback: LoraPruneCallback) -> None:
    """Makes TRL's scripts build a trainer that prunes."""
    kind = getattr(trl, name)

    def make(**settings: Any) -> Any:
        trainer = kind(callbacks=[callback], **settings)
        drive(trainer, callback)
        return trainer

    setattr(trl, name, make)


if __name__ == "__main__":
    main(sys.argv[1:])
