"""Prunes in LLaMA-Factory: its YAML with a block `loraprune: {ratio: 0.3}`, and its `key=value` behind it."""

import sys
from pathlib import Path
from typing import Any

from llamafactory.hparams import get_train_args, read_args  # pyright: ignore[reportMissingImports]
from llamafactory.train.tuner import run_exp  # pyright: ignore[reportMissingImports]

from loraprune_ds.errors import require, shorten_errors
from loraprune_ds.hf import plugin

TARGETS = "lora_target"
ALLOWED = {
    "stage": ("sft", "pt", "dpo"),
    "finetuning_type": ("lora",),
    "optim": plugin.OPTIMIZERS,
    "quantization_bit": (None, 4),
    "use_dora": plugin.PLAIN,
    "pissa_init": plugin.PLAIN,
}


def main() -> None:
    """Trains as LLaMA-Factory does, and prunes. Its next commands get a config."""
    shorten_errors()
    given: Any = read_args()
    require(isinstance(given, dict), "give a YAML of LLaMA-Factory, and then key=value")
    block = given.pop(plugin.BLOCK, None)
    parts = get_train_args(dict(given))
    settings = {key: value for part in parts for key, value in vars(part).items()}
    linears = settings[TARGETS]
    settings |= {plugin.BLOCK: block, TARGETS: linears != ["all"] and linears}
    model, _, training, *_ = parts
    config, linears = plugin.check_settings(settings, model.model_name_or_path, ALLOWED, TARGETS)
    plugin.drive_next(config)
    run_exp(given | {TARGETS: ",".join(linears)})
    if training.should_save:
        out = Path(training.output_dir).absolute()
        kept = {key: given[key] for key in given.keys() - vars(training)}
        as_it_is = {"adapter_name_or_path": str(out), "quantization_bit": None}
        path = plugin.write_next(kept, out, plugin.BASE_FOLDER, **as_it_is)
        sys.stdout.write(
            f"{plugin.BLOCK}: next: llamafactory-cli chat {path}\n"
            f"{plugin.BLOCK}: or: llamafactory-cli export {path} export_dir={out}-merged\n"
        )


if __name__ == "__main__":
    main()
