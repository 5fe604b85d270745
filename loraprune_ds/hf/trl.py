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
    PluginCallback,
    Tool,
    check_settings,
    drive,
)
from loraprune_ds.session.preparing import before_lora

TRAINERS = {"sft": "SFTTrainer", "dpo": "DPOTrainer"}
TOOL = Tool(
    model="model_name_or_path",
    targets="lora_target_modules",
    values={"use_peft": (True,), "use_dora": PLAIN, "optim": OPTIMIZERS},
)


def main(arguments: list[str]) -> None:
    """Runs a script of TRL with a trainer that prunes."""
    shorten_errors()
    command = arguments[0] if arguments else "nothing"
    require(command in TRAINERS, f"the first argument is sft or dpo; got {command}")
    require("--config" in arguments[:-1], f"--config must name a YAML with the block {BLOCK}")
    block = read_config(arguments[arguments.index("--config") + 1]).get(BLOCK)
    script = import_module(f"trl.scripts.{command}")
    parts = script.make_parser(prog=command).parse_args_and_config(
        arguments[1:], fail_with_unknown_args=False
    )
    settings: dict[str, Any] = {BLOCK: block}
    for part in parts:
        settings |= vars(part)
    config, linears = check_settings(TOOL, settings)
    of_model = next(part for part in parts if hasattr(part, TOOL.targets))
    of_model.lora_target_modules = of_model.lora_target_modules or linears
    _replace(TRAINERS[command], PluginCallback(config))
    script.main(*parts)


def _replace(name: str, callback: PluginCallback) -> None:
    """Makes TRL's scripts build a trainer that prunes."""
    kind = getattr(trl, name)

    def make(**settings: Any) -> Any:
        trainer = kind(callbacks=[callback], **settings)
        drive(trainer, callback)
        return trainer

    module: Any = sys.modules[kind.__module__]
    wrap = module.get_peft_model
    module.get_peft_model = lambda model, *more, **named: wrap(before_lora(model), *more, **named)
    setattr(trl, name, make)


if __name__ == "__main__":
    main(sys.argv[1:])
