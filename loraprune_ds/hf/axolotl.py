"""Prunes in Axolotl: `plugins: [loraprune_ds.hf.axolotl.LoraPrunePlugin]` and `loraprune: {ratio: 0.3}` in its YAML."""

import logging
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from pydantic import BaseModel

try:
    from loraprune_ds.errors import shorten_errors
    from loraprune_ds.hf import plugin
except ImportError as error:  # Axolotl would train on without this plugin
    raise SystemExit(f"loraprune: {error}; install it, or remove the plugin") from None

log = logging.getLogger(__name__)
KERNELS = dict.fromkeys(("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"), False)
# The pruned base has the weights that 4 bits meant. Its only code is ours, for layers that differ.
AS_IT_IS = {"adapter": "lora", "load_in_4bit": False, "load_in_8bit": False}
AS_IT_IS |= {"trust_remote_code": True, **KERNELS}
ALLOWED = {
    "adapter": ("lora", "qlora"),
    "optimizer": plugin.OPTIMIZERS,
    "peft_use_dora": plugin.PLAIN,
}


class Arguments(BaseModel):
    """Adds our block to Axolotl's config."""

    loraprune: dict[str, Any] | None = None


class LoraPrunePlugin(BasePlugin):
    """Prunes while Axolotl tunes. Its later commands get the pruned base."""

    callback: Any

    def get_input_args(self) -> str:
        return f"{__name__}.{Arguments.__name__}"

    def register(self, cfg: Any) -> None:
        """Checks the block. In a later command, puts the pruned base in the place of the base."""
        shorten_errors()
        plugin.read_block(cfg)
        if cfg["merge_lora"] or cfg["inference"]:
            base = plugin.find_base(Path(cfg["lora_model_dir"] or cfg["output_dir"]))
            log.warning("loraprune: %s takes the place of base_model, as it is", base)
            cfg.update(AS_IT_IS, base_model=str(base), revision_of_model=None)
            _merge_as_it_is()

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Checks the config of a training, before it reads any data."""
        config, linears = plugin.check_settings(cfg, cfg["base_model"], ALLOWED)
        if not cfg["lora_target_linear"]:
            cfg[plugin.TARGETS] = linears
        log.warning("loraprune: %s are off: they go around scored linears", ", ".join(KERNELS))
        cfg.update(KERNELS)
        self.callback = plugin.LoraPruneCallback(config)

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return [self.callback]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        plugin.drive(trainer, self.callback)


def _merge_as_it_is() -> None:
    """Keeps a merge from rounding the base to 4 bits, for which it has read the config before the plugin changed it."""
    from axolotl.cli import merge_lora as command  # pyright: ignore[reportMissingImports]

    merge = command.merge_lora_sharded_efficient
    command.merge_lora_sharded_efficient = lambda **more: merge(**more | {"simulate_nf4": False})
