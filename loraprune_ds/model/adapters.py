"""PEFT LoRA on all linears of every decoder layer, fresh or from an existing adapter."""

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from loraprune_ds.config import LoraConfig
from loraprune_ds.model.experts import ExpertLora, ExpertStack
from loraprune_ds.model.groups import LayerSpec
from loraprune_ds.model.lora_product import FusedLoraLinear
from loraprune_ds.model.shape import ModelShape

ADAPTER = "default"
# up to this hidden_size a layer is gathered as one: 0.4 GB in bf16 for LLaMA-7B
LEAF_LAYER_HIDDEN = 4096


def add_lora(model: PreTrainedModel, shape: ModelShape, config: LoraConfig, seed: int) -> PeftModel:
    """Wraps the model. A depends on `seed` alone, not on the number of ranks. B is zero."""
    torch.manual_seed(seed)
    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),  # PEFT declares an int, and divides it as a float
        lora_dropout=config.lora_dropout,
        # Full names, because other linears can have the same last name.
        target_modules=[f"{shape.prefix(i)}{linear.linear}" for i, linear in shape.linears()],
        bias="none",
        task_type=task_type(shape),
    )
    peft_config._register_custom_module({ExpertStack: ExpertLora, nn.Linear: FusedLoraLinear})
    own: Any = model.config
    # otherwise PEFT takes a dense MLP for experts of transformers 4
    model_type, own.model_type = own.model_type, ""
    wrapped = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    own.model_type = model_type
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        # PEFT leaves LoRA on an int8 weight in fp32
        parameter.data = parameter.data.to(model.dtype)
    return cast(PeftModel, wrapped)


def task_type(shape: ModelShape) -> str:
    """Returns PEFT's name for a model of this kind."""
    return "SEQ_2_SEQ_LM" if shape.family.has_encoder else "CAUSAL_LM"


def leaf_modules(layer: nn.Module, shape: ModelShape) -> list[nn.Module]:
    """Lists the modules of a decoder layer that ZeRO-3 gathers as one: the layer, or each linear with its LoRA.

    One gather per layer costs the host less, but a rank briefly holds the layer twice. A cut must not change the
    choice, because that would change the order of sums.
    """
    if shape.hidden_size <= LEAF_LAYER_HIDDEN:
        return [layer]
    return [module for module in layer.modules() if isinstance(module, LoraLinear)]


def differentiate_input(layer: nn.Module) -> None:
    """Makes the backward pass reach the input of the first decoder layer, although nothing before it is trained.

    DeepSpeed reduces the gradients of a layer that is gathered as one when the gradient of its input arrives.
    """

    def differentiate(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0].detach()
        return (hidden.requires_grad_() if torch.is_grad_enabled() else hidden, *inputs[1:])

    layer.register_forward_pre_hook(differentiate)


def lora_linear(layer: nn.Module, name: str) -> LoraLinear:
    module = layer.get_submodule(name)
    assert isinstance(module, LoraLinear)
    return module


def lora_weights(module: LoraLinear, adapter: str = ADAPTER) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns the parameters A (r, in_features) and B (out_features, r)."""
    a, b = (cast(nn.Linear, factors[adapter]).weight for factors in (module.lora_A, module.lora_B))
    return cast(nn.Parameter, a), cast(nn.Parameter, b)


def last_names(names: Iterable[str]) -> list[str]:
    """Returns the distinct last parts of dotted names, as in PEFT's `target_modules`."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def base_parameter(module: nn.Module, name: str, *, trained: bool = False) -> nn.Parameter:
    """Returns a parameter by its name in the weight files, past PEFT's wrappers.

    Args:
        trained: takes the trained copy of a module in `modules_to_save`.
    """
    path, _, attribute = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(owner, LoraLinear):
        owner = owner.base_layer
    elif isinstance(owner, ModulesToSaveWrapper):
        owner = owner.modules_to_save[ADAPTER] if trained else owner.original_module
    return cast(nn.Parameter, getattr(owner, attribute))


def set_sizes(layer: nn.Module, spec: LayerSpec) -> None:
    """Gives the modules of a layer, with or without LoRA, the sizes of a smaller one.

    PEFT reads those of linears in repr, merge and save, the forward reads the counts. A config that layers share is
    copied first.
    """
    for linear in spec.linears:
        module: Any = layer.get_submodule(linear.linear)
        for holder in (module, getattr(module, "base_layer", module)):
            holder.out_features, holder.in_features = linear.matrix
        for adapter in getattr(module, "lora_A", ()):
            a, b = module.lora_A[adapter], module.lora_B[adapter]
            (a.out_features, a.in_features), (b.out_features, b.in_features) = linear.lora_shapes(
                b.in_features
            )
    for attribute in spec.attributes:
        path, _, last = attribute.module.rpartition(".")
        holder = layer.get_submodule(path)
        owner: Any = getattr(holder, last)
        if not isinstance(owner, nn.Module):
            owner = copy.copy(owner)
            setattr(holder, last, owner)
        setattr(owner, attribute.name, attribute.span.size // attribute.ranges)
