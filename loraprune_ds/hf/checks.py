"""Refuses trainings that cannot be pruned, each in one line before the first step."""

import logging
from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from loraprune_ds.errors import require
from loraprune_ds.model.adapters import ADAPTER, last_names, lora_weights
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.families.base import Family
from loraprune_ds.model.shape import ModelShape

log = logging.getLogger(__name__)

Refused = Callable[[Any], bool]
KEEPS_HEADS = "such a cache keeps the dense number of heads"
GROWING_CACHES = (None, "dynamic", "offloaded", "quantized")  # others have the dense sizes of a config
# (argument of a Trainer or a part of one, whether its value is refused, reason). A Trainer may lack an argument.
ARGUMENTS: tuple[tuple[str, Refused, str], ...] = (
    ("load_best_model_at_end", bool, "the best checkpoint may be from before a cut, and then does not fit the model"),
    ("auto_find_batch_size", bool, "a second attempt would begin with a pruned model"),
    ("torch_compile", bool, "compiled code keeps the sizes from before a cut"),
    ("use_vllm", bool, "vLLM holds the dense model and cannot load smaller weights; generate with transformers"),
    ("use_transformers_continuous_batching", bool, "its cache has the dense number of heads"),
    ("cache_implementation", lambda value: value not in GROWING_CACHES, KEEPS_HEADS),
    ("generation_kwargs", lambda value: (value or {}).get("cache_implementation") not in GROWING_CACHES, KEEPS_HEADS),
    ("parallelism_config.sp_size", lambda size: (size or 1) > 1, "Ulysses fixes the head counts when it starts"),
    ("parallelism_config.cp_size", lambda size: (size or 1) > 1, "context parallelism splits samples over ranks"),
    ("precompute_ref_log_probs", bool, "they come from the dense model, but the reference is the pruned base"),
)
# (whether PEFT's module for a linear is refused, reason). A row relies on the rows before it.
LINEARS: tuple[tuple[Refused, str], ...] = (
    (lambda x: x is None, "does not exist"),
    (lambda x: not hasattr(x, "base_layer"), "has no LoRA, which the criterion needs on every linear: {needed}"),
    (lambda x: (type(x), type(x.base_layer)) != (LoraLinear, nn.Linear), "is a {kind}, not plain LoRA over a linear"),
    (lambda x: ADAPTER not in x.lora_A, f"has no LoRA of the adapter {ADAPTER!r}: {{needed}}"),
    (lambda x: any(map(x.lora_variant.get, x.lora_A)), "has a variant of LoRA, such as DoRA; use plain LoRA"),
    (lambda x: any(map(x.lora_bias.get, x.lora_A)), "has lora_bias, which is not supported"),
    (lambda x: not all(weight.requires_grad for weight in lora_weights(x)), f"has frozen LoRA of {ADAPTER!r}"),
)


def check_arguments(args: Any, model: nn.Module) -> None:
    """Raises UserError for an argument of a Trainer or a cache of the model that does not allow cuts."""
    for name, refused, reason in ARGUMENTS:
        value = reduce(lambda found, key: getattr(found, key, None), name.split("."), args)
        require(not refused(value), f"{name}={value}: {reason}")
    cache = getattr(getattr(model, "generation_config", None), "cache_implementation", None)
    require(cache in GROWING_CACHES, f"generation_config.cache_implementation={cache}: {KEEPS_HEADS}")


def refuse_mixture(family: Family, where: str) -> None:
    """Refuses families with experts, because only a run builds stacks of experts with LoRA."""
    line = f"{where}: the callback cannot prune families with experts, not even dense models; use launch/run.py"
    require(not family.has_experts, line)


def check_one_dtype(model: nn.Module) -> None:
    """Checks that a model that is built sharded has trained weights of one dtype. DeepSpeed only asserts it.

    PEFT makes LoRA fp32 by default, but not `modules_to_save`.
    """
    born_sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    require(
        not born_sharded or len(dtypes) < 2,
        f"trained weights are in {' and '.join(dtypes)}, but ZeRO-3 needs one dtype for its buffer; "
        "call get_peft_model with autocast_adapter_dtype=False",
    )


def check_model(model: PeftModel, shape: ModelShape) -> None:
    """Checks that a live model has the LoRA that the criterion needs, and that the rest allows a cut.

    `shape` comes from the config. UserError names the layer and linear, or PEFT's setting.
    """
    family = shape.family
    refuse_mixture(family, shape.model_type)
    shared = (
        f"the layers of a {shape.model_type} share one bias, so their heads cannot differ; pass unshare_bias(model)"
    )
    require(family.shared_bias is None, f"{shared} to get_peft_model")
    optimized: Any = torch._dynamo.OptimizedModule
    compiled = any(isinstance(m, optimized) or m._compiled_call_impl is not None for m in model.modules())
    require(not compiled, "a model compiled by torch.compile keeps the sizes from before a cut")
    base = cast(Any, model.get_base_model())
    for name, value in family.changed_in_memory(base.config).items():
        log.warning("%s=%s of the model makes scores random, and dependent on the ranks; set it to 0", name, value)
    quantised = getattr(base.config, "quantization_config", None) or getattr(base, "is_quantized", False)
    unquantised = "load it in bfloat16, float16 or float32. Only launch/run.py holds int8 weights (model.frozen)"
    require(not quantised, f"a quantised base has no flat shards to cut; {unquantised}")
    require(ADAPTER in model.peft_config, f"the trained adapter must be called {ADAPTER!r}, which is PEFT's default")
    for name, peft_config in model.peft_config.items():
        bias = getattr(peft_config, "bias", "none")
        require(bias == "none", f"adapter {name}: bias={bias!r}: trained biases are not supported")
    needed = f"target_modules={last_names(linear.linear for _, linear in shape.linears())}"
    for index, layer in enumerate(decoder_layers(model)):
        modules: dict[str, Any] = dict(layer.named_modules())
        for linear in shape.layers[index].linears:
            module = modules.get(linear.linear)
            over = type(getattr(module, "base_layer", None)).__name__
            kind = f"{type(module).__module__}.{type(module).__name__} over a {over}"
            for refused, reason in LINEARS:
                where = f"layer {index} {linear.linear}"
                require(not refused(module), f"{where} {reason.format(needed=needed, kind=kind)}")
    _check_others(model, shape)


def _check_others(model: PeftModel, shape: ModelShape) -> None:
    """Checks other trained modules. An export must hold them, and a cut must not change them."""
    layers = decoder_layers(model)
    pruned = {id(layers[i].get_submodule(linear.linear)) for i, linear in shape.linears()}
    others = {tensor.name for layer in shape.layers for tensor in layer.others if tensor.runs}
    cut_along = tuple(f".{name.rpartition('.')[0]}" for name in others)
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        require(
            not isinstance(module, BaseTunerLayer) or id(module) in pruned,
            f"{name} has LoRA, which an export would lose: only linears of the decoder layers may have it. Use "
            "target_modules=linear_names(model), and modules_to_save for other modules",
        )
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        require(isinstance(module, ModulesToSaveWrapper), f"{name}: trainable_token_indices are not supported")
        require(not name.endswith(cut_along), f"modules_to_save: a cut makes {name} smaller, so it cannot train")
        lost = "modules_to_save with tied embeddings: the exported model would lose one of the two"
        require(not shape.tie_word_embeddings, lost)


def warn_of_rounded_gradients(dtypes: set[torch.dtype]) -> None:
    """Warns if gradients are not averaged in fp32."""
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        log.warning(
            "gradients are averaged in %s, so scores depend on the number of ranks and micro-batches; write "
            '"communication_data_type": "fp32" and "data_types": {"grad_accum_dtype": "fp32"} in the DeepSpeed config',
            names,
        )
