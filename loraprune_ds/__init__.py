"""LoRA-guided structured pruning of language models on DeepSpeed ZeRO-3.

from loraprune_ds import LoraPruneCallback, PruneConfig, Pruning, drop_layers, lora_config, open_result, prepare_model

A name is imported when it is first used. The package itself imports neither torch nor DeepSpeed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers
    from loraprune_ds.config import PruneConfig
    from loraprune_ds.generate.models import open_result
    from loraprune_ds.hf.callback import LoraPruneCallback
    from loraprune_ds.pretrained.fewer_layers import drop_layers
    from loraprune_ds.session.preparing import linear_names, lora_config, prepare_model
    from loraprune_ds.session.pruning import Pruning

__version__ = "0.2.0"
__all__ = [
    "LoraPruneCallback",
    "PruneConfig",
    "Pruning",
    "drop_layers",
    "linear_names",
    "lora_config",
    "open_result",
    "prepare_model",
]
_MODULES = {
    "LoraPruneCallback": "hf.callback",
    "PruneConfig": "config",
    "Pruning": "session.pruning",
    "drop_layers": "pretrained.fewer_layers",
    "linear_names": "session.preparing",
    "lora_config": "session.preparing",
    "open_result": "generate.models",
    "prepare_model": "session.preparing",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
