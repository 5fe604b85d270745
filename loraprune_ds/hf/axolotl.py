"""Prunes in Axolotl: `plugins: [loraprune_ds.hf.axolotl.LoraPrunePlugin]` and `loraprune: {ratio: 0.3}` in its YAML.

Axolotl trains on without a plugin whose import fails, so this file imports its own parts alone. `register` tries ours.
"""

import logging
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

log = logging.getLogger(__name__)
KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")
# The pruned base has the weights that 4 bits meant. Its only code is ours, for layers that differ.
AS_IT_IS = {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": False}
AS_IT_IS |= {"trust_remote_code": True, **dict.fromkeys(KERNELS, False)}


class Arguments(BaseModel):
    """Adds our block to Axolotl's config."""

    loraprune: dict[str, Any] | None = None


class LoraPrunePlugin(BasePlugin):
    """Prunes while Axolotl tunes. Its later commands get the pruned base."""

    callback: Any = None  # of a training

    def get_input_args(self) -> str:
        return f"{__name__}.{Arguments.__name__}"

    def register(self, cfg: Any) -> None:
        """Checks the block. In a later command, puts the pruned base in the place of the base."""
        try:
            from loraprune_ds.errors import shorten_errors
            from loraprune_ds.hf.plugin import find_base, read_block
        except ImportError as error:
            raise SystemExit(f"loraprune: {error}; install it, or remove the plugin") from None
        shorten_errors()
        read_block(cfg["loraprune"])
        if cfg["merge_lora"] or cfg["inference"]:
            base = find_base(Path(cfg["lora_model_dir"] or cfg["output_dir"]))
            log.warning("loraprune: %s takes the place of base_model, as it is", base)
            cfg.update(AS_IT_IS, base_model=str(base), revision_of_model=None)
            _merge_as_it_is()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Checks the config of a training, before it reads any data."""
        from loraprune_ds.hf.plugin import PluginCallback, Tool, check_settings

        tool = Tool(
            model="base_model",
            lora="adapter",
            with_lora=("lora", "qlora"),
            targets="lora_target_modules",
            dora="peft_use_dora",
            optimizer="optimizer",
            resume=("resume_from_checkpoint", "auto_resume_from_checkpoints"),
        )
        config, linears = check_settings(tool, cfg)
        if not (cfg["lora_target_modules"] or cfg["lora_target_linear"]):
            cfg["lora_target_modules"] = linears
        on = [name for name in KERNELS if cfg[name] is not False]
        if on:
            log.warning("loraprune: %s are off: they go around scored linears", ", ".join(on))
            cfg.update(dict.fromkeys(on, False))
        self.callback = PluginCallback(config)

    def pre_lora_load(self, cfg: Any, model: Any) -> None:
        from loraprune_ds.errors import require
        from loraprune_ds.session.preparing import before_lora

        same = self.callback is None or before_lora(model) is model
        require(same, f"a {type(model).__name__} changes before LoRA, which Axolotl does not allow")

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [self.callback]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        from loraprune_ds.hf.plugin import drive

        drive(trainer, self.callback)


def _merge_as_it_is() -> None:
    """Keeps a merge from rounding the base to 4 bits, for which it has read the config before the plugin changed it."""
    from axolotl.cli import merge_lora as command  # pyright: ignore[reportMissingImports]

    merge = command.merge_lora_sharded_efficient
    command.merge_lora_sharded_efficient = lambda **more: merge(**more | {"simulate_nf4": False})
