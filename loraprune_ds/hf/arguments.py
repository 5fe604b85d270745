"""Refuses arguments of a Trainer that do not allow cuts."""

from typing import Any

from torch import nn

from loraprune_ds.errors import require
from loraprune_ds.session.checks import Refused
from loraprune_ds.session.compiled import COMPILED

KEEPS_HEADS = "such a cache keeps the dense number of heads"
# others have the dense sizes of a config
GROWING_CACHES = (None, "dynamic", "offloaded", "quantized")
# (argument of a Trainer or a part of one, whether its value is refused, reason). A Trainer may lack an argument.
ARGUMENTS: tuple[tuple[str, Refused, str], ...] = (
    (
        "load_best_model_at_end",
        bool,
        "the best checkpoint may be from before a cut, and then does not fit the model",
    ),
    ("auto_find_batch_size", bool, "a second attempt would begin with a pruned model"),
    (
        "fsdp_config",
        lambda config: _is_fsdp1(config or {}),
        "FSDP1's flat shards cannot be cut; set version to 2",
    ),
    (
        "n_gpu",
        lambda count: (count or 0) > 1,
        "DataParallel copies the model in each pass; start a process per GPU",
    ),
    ("torch_compile", bool, COMPILED),
    (
        "use_vllm",
        bool,
        "vLLM holds the dense model and cannot load smaller weights; generate with transformers",
    ),
    ("use_transformers_continuous_batching", bool, "its cache has the dense number of heads"),
    ("cache_implementation", lambda value: value not in GROWING_CACHES, KEEPS_HEADS),
    (
        "generation_kwargs",
        lambda value: (value or {}).get("cache_implementation") not in GROWING_CACHES,
        KEEPS_HEADS,
    ),
    (
        "parallelism_config.sp_size",
        lambda size: (size or 1) > 1,
        "Ulysses fixes the head counts when it starts",
    ),
    (
        "parallelism_config.cp_size",
        lambda size: (size or 1) > 1,
        "context parallelism splits samples over ranks",
    ),
    (
        "precompute_ref_log_probs",
        bool,
        "they come from the dense model, but the reference is the pruned base",
    ),
)


def check_arguments(args: Any, model: nn.Module | None) -> None:
    """Raises UserError for an argument of a Trainer or a cache of the model that does not allow cuts."""
    for name, refused, reason in ARGUMENTS:
        value = args
        for key in name.split("."):
            value = getattr(value, key, None)
        require(not refused(value), f"{name}={value}: {reason}")
    cache = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    require(
        cache in GROWING_CACHES, f"generation_config.cache_implementation={cache}: {KEEPS_HEADS}"
    )


def _is_fsdp1(fsdp_config: dict[str, Any]) -> bool:
    return int(fsdp_config.get("version", 2)) == 1 or bool(fsdp_config.get("xla"))
