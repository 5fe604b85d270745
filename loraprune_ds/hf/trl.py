"""Prunes in TRL's own scripts, with all of their flags and a block `loraprune: {ratio: 0.3}` in their YAML.

%(prog)s sft --config x.yaml
%(prog)s dpo --config x.yaml
"""

import sys
from importlib import import_module
from pathlib import Path

from loraprune_ds.arguments import Parser
from loraprune_ds.config_file import read_config
from loraprune_ds.errors import shorten_errors
from loraprune_ds.hf.plugin import (
    BLOCK,
    OPTIMIZERS,
    PLAIN,
    TARGETS,
    check_settings,
    drive_next,
    write_next,
)
from loraprune_ds.report.records import MODEL_FOLDER

SCRIPTS = ("sft", "dpo")
ALLOWED = {"use_peft": (True,), "optim": OPTIMIZERS, "use_dora": PLAIN}


def main(arguments: list[str]) -> None:
    """Runs a script of TRL with a trainer that prunes."""
    shorten_errors()
    parser = Parser(__doc__)
    parser.add_argument("script", choices=SCRIPTS)
    parser.add_argument("--config", required=True, help=f"a YAML of TRL with the block {BLOCK}")
    own, flags = parser.parse_known_args(arguments)
    settings = read_config(own.config)
    script = import_module(f"trl.scripts.{own.script}")
    theirs = script.make_parser()
    theirs.set_defaults_with_config(**settings)
    given = settings | vars(theirs.parse_args(flags))
    parts = theirs.parse_args_and_config(
        ["--config", own.config, *flags], fail_with_unknown_args=False
    )
    for part in parts:
        settings |= vars(part)
    _, training, model, *_ = parts
    config, model.lora_target_modules = check_settings(settings, model.model_name_or_path, ALLOWED)
    given[TARGETS] = model.lora_target_modules  # PEFT knows none for layers that differ
    drive_next(config, merged=True)
    script.main(*parts)
    if training.should_save:
        out = Path(training.output_dir).absolute()
        path = write_next(given, out, MODEL_FOLDER, output_dir=str(out / "next"))
        sys.stdout.write(f"{BLOCK}: to train the result on: trl {own.script} --config {path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
