"""Checks a live PEFT model. A refusal is one line before step 1."""

import logging
from collections.abc import Callable
from typing import Any, cast

from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from loraprune_ds.engines import holder
from loraprune_ds.errors import require
from loraprune_ds.model.adapters import ADAPTER, lora_weights, target_modules
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import ExpertLora, ExpertStack, has_stacks
from loraprune_ds.model.frozen import QuantisedLinear
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.session.live import base_shape
from loraprune_ds.session.quantised import AdoptedLora, quantisation

log = logging.getLogger(__name__)

Refused = Callable[[Any], bool]

# the class of LoRA, and that of the linear inside
PLAIN = ((LoraLinear, nn.Linear), (AdoptedLora, QuantisedLinear), (ExpertLora, ExpertStack))
# (whether PEFT's module for a linear is refused, reason). A row relies on the rows before it.
LINEARS: tuple[tuple[Refused, str], ...] = (
    (lambda x: x is None, "does not exist"),
    (
        lambda x: not hasattr(x, "base_layer"),
        "has no LoRA, which the criterion needs on every linear: {needed}",
    ),
    (
        lambda x: (type(x), type(x.base_layer)) not in PLAIN,
        "is a {kind}, not plain LoRA over a linear",
    ),
    (lambda x: ADAPTER not in x.lora_A, f"has no LoRA of the adapter {ADAPTER!r}: {{needed}}"),
    (
        lambda x: any(map(x.lora_variant.get, x.lora_A)),
        "has a variant of LoRA, such as DoRA; use plain LoRA",
    ),
    (lambda x: any(map(x.lora_bias.get, x.lora_A)), "has lora_bias, which is not supported"),
    (
        lambda x: not all(weight.requires_grad for weight in lora_weights(x)),
        f"has frozen LoRA of {ADAPTER!r}",
    ),
)


def check_one_dtype(model: nn.Module) -> None:
    """Checks that a model that is built sharded has trained weights of one dtype. DeepSpeed only asserts it.

    PEFT makes LoRA fp32 by default, but not `modules_to_save`.
    """
    dtypes = sorted(
        {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    )
    on_zero_3 = any(holder(parameter).name == "zero3" for parameter in model.parameters())
    require(
        len(dtypes) < 2 or not on_zero_3,
        f"trained weights are in {' and '.join(dtypes)}, but ZeRO-3 needs one dtype for its buffer; "
        "call get_peft_model with autocast_adapter_dtype=False",
    )


def check_model(model: PeftModel) -> None:
    """Checks that a live model has the LoRA that the criterion needs, and that the rest allows a cut.

    UserError names the layer and linear, or PEFT's setting.
    """
    shape = base_shape(model)
    family = shape.family
    require(
        family.shared_bias is None and (has_stacks(model) or "experts" not in shape.kinds),
        f"a {shape.model_type} cannot be cut as it was loaded; "
        "pass prepare_model(model) to get_peft_model",
    )
    base = cast(Any, model.get_base_model())
    for name, value in family.changed_in_memory(base.config).items():
        log.warning(
            "%s=%s of the model makes scores random, and dependent on the ranks; set it to 0",
            name,
            value,
        )
    method = quantisation(model)
    require(
        method in (None, "bitsandbytes"),
        f"a base quantised by {method} cannot be cut; load it unquantised, or by bitsandbytes: "
        "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')",
    )
    require(
        ADAPTER in model.peft_config,
        f"the trained adapter must be called {ADAPTER!r}, which is PEFT's default",
    )
    for name, peft_config in model.peft_config.items():
        bias = getattr(peft_config, "bias", "none")
        require(bias == "none", f"adapter {name}: bias={bias!r}: trained biases are not supported")
    needed = f"target_modules={target_modules(shape)}"
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
    others = {tensor.name for layer in shape.layers for tensor in layer.others if tensor.spans}
    cut_along = tuple(f".{name.rpartition('.')[0]}" for name in others)
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        require(
            not isinstance(module, BaseTunerLayer) or id(module) in pruned,
            f"{name} has LoRA, which an export would lose: only linears of the decoder layers may have it. "
            "Use target_modules=linear_names(model), and modules_to_save for other modules",
        )
        if not isinstance(module, AuxiliaryTrainingWrapper):
            continue
        require(
            isinstance(module, ModulesToSaveWrapper),
            f"{name}: trainable_token_indices are not supported",
        )
        require(
            not name.endswith(cut_along),
            f"modules_to_save: a cut makes {name} smaller, so it cannot train",
        )
        require(
            not shape.tie_word_embeddings,
            "modules_to_save with tied embeddings: the exported model would lose one of the two",
        )
