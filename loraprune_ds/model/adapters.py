"""PEFT LoRA on all linears of every decoder layer, fresh or from an existing adapter."""

import copy
from collections.abc import Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from loraprune_ds.config import LoraConfig
from loraprune_ds.model.experts import ExpertLora, ExpertStack, has_stacks
from loraprune_ds.model.groups import Attribute, LayerSpec, TensorSpec
from loraprune_ds.model.lora_product import FusedLoraLinear
from loraprune_ds.model.shape import ModelShape

ADAPTER = "default"
STACKS: dict[type[nn.Module], type[nn.Module]] = {ExpertStack: ExpertLora}
CONVERSION = "peft.utils.transformers_weight_conversion"
# Up to this hidden_size a layer is gathered as one: 0.4 GB in bf16 for LLaMA-7B.
LEAF_LAYER_HIDDEN = 4096


def add_lora(model: PreTrainedModel, shape: ModelShape, config: LoraConfig, seed: int) -> PeftModel:
    """Wraps the model. A depends on `seed` alone, not on the number of ranks. B is zero."""
    torch.manual_seed(seed)
    # Full names, because other linears can have the same last name.
    names = [f"{shape.prefix(i)}{linear.linear}" for i, linear in shape.linears()]
    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),  # PEFT declares an int, and divides it as a float
        lora_dropout=config.lora_dropout,
        target_modules=names,
        bias="none",
        task_type=task_type(shape),
    )
    peft_config._register_custom_module(STACKS | {nn.Linear: FusedLoraLinear})
    meet_stacks()
    wrapped = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            # PEFT leaves LoRA on an int8 weight in fp32.
            parameter.data = parameter.data.to(model.dtype)
    return cast(PeftModel, wrapped)


def meet_stacks() -> None:
    """Makes PEFT put our LoRA on the stacks of a model, whoever made the config. PEFT before 0.20 needs the config."""
    if not find_spec(CONVERSION):
        return
    module: Any = import_module(CONVERSION)
    convert = module.convert_peft_config_for_transformers
    if not isinstance(convert, partial):
        module.convert_peft_config_for_transformers = partial(_convert_unless_stacked, convert)


def _convert_unless_stacked(convert: Any, config: Any, model: nn.Module, **more: Any) -> None:
    """PEFT would take a dense MLP beside stacks for experts of transformers 4."""
    if has_stacks(model):
        config._register_custom_module(STACKS)
    else:
        convert(config, model=model, **more)


def task_type(shape: ModelShape) -> str:
    """Returns PEFT's name for a model of this kind."""
    return "SEQ_2_SEQ_LM" if shape.family.has_encoder else "CAUSAL_LM"


def is_gathered_whole(shape: ModelShape) -> bool:
    """Says whether ZeRO-3 gathers a decoder layer as one."""
    return shape.hidden_size <= LEAF_LAYER_HIDDEN


def leaf_modules(layer: nn.Module, shape: ModelShape) -> list[nn.Module]:
    """Lists the modules of a decoder layer that ZeRO-3 gathers as one: the layer, or each linear with its LoRA.

    One gather per layer costs the host less, but a rank briefly holds the layer twice. A cut must not change the
    choice, because that would change the order of sums.
    """
    if is_gathered_whole(shape):
        return [layer]
    return [module for module in layer.modules() if isinstance(module, LoraLinear)]


def differentiate_input(layer: nn.Module) -> None:
    """Makes the backward pass reach the input of the first decoder layer, although no earlier layer is trained.

    DeepSpeed reduces the gradients of a layer that is gathered as one when the gradient of its input arrives.
    """

    def differentiate(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0].detach()
        if torch.is_grad_enabled():
            hidden.requires_grad_()
        return (hidden, *inputs[1:])

    layer.register_forward_pre_hook(differentiate)


def lora_linear(layer: nn.Module, name: str) -> LoraLinear:
    module = layer.get_submodule(name)
    assert isinstance(module, LoraLinear)
    return module


def base_linear(layer: nn.Module, name: str) -> nn.Module:
    """Returns the frozen linear inside PEFT's LoRA, or the linear itself if it has no LoRA."""
    module = layer.get_submodule(name)
    return module.base_layer if isinstance(module, LoraLinear) else module


def lora_weights(module: LoraLinear, adapter: str = ADAPTER) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns the parameters A (r, in_features) and B (out_features, r)."""
    a = cast(nn.Parameter, module.lora_A[adapter].weight)
    b = cast(nn.Parameter, module.lora_B[adapter].weight)
    return a, b


def target_modules(shape: ModelShape) -> list[str]:
    """Returns the last names of all linears of the decoder layers, as in PEFT's `target_modules`."""
    return last_names(linear.linear for _, linear in shape.linears())


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

    PEFT reads the sizes of linears in repr, merge and save. The forward reads the counts.
    """
    for linear in spec.linears:
        _set_linear_size(layer.get_submodule(linear.linear), linear)
    for attribute in spec.attributes:
        _set_count(layer, attribute)


def _set_linear_size(module: Any, linear: TensorSpec) -> None:
    for holder in (module, getattr(module, "base_layer", module)):
        holder.out_features, holder.in_features = linear.matrix
    for adapter in getattr(module, "lora_A", ()):
        a = module.lora_A[adapter]
        b = module.lora_B[adapter]
        a_shape, b_shape = linear.lora_shapes(b.in_features)
        a.out_features, a.in_features = a_shape
        b.out_features, b.in_features = b_shape


def _set_count(layer: nn.Module, attribute: Attribute) -> None:
    """Layers may share a config, so a config is copied first."""
    path, _, name = attribute.module.rpartition(".")
    parent = layer.get_submodule(path)
    owner: Any = getattr(parent, name)
    if not isinstance(owner, nn.Module):
        owner = copy.copy(owner)
        setattr(parent, name, owner)
    setattr(owner, attribute.name, attribute.span.size // attribute.ranges)
