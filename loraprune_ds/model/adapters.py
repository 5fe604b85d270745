"""PEFT LoRA on all linears of every decoder layer, fresh or from an existing adapter."""

import copy
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json
from loraprune_ds.model.experts import ExpertLora, ExpertStack, as_in_peft
from loraprune_ds.model.groups import LayerSpec, TensorSpec
from loraprune_ds.model.lora_product import FusedLoraLinear
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.model.weight_files import ADAPTER_WEIGHTS, read_header

BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"  # folders of an export with unmerged LoRA
ADAPTER = "default"
ADAPTER_FILE = "adapter_config.json"
# variants that compute something else
VARIANTS = ("use_dora", "use_rslora", "alora_invocation_tokens")
PATTERNS = ("rank_pattern", "alpha_pattern")
STARTS_THAT_CHANGE_W = ("pissa", "olora", "corda", "loftq", "lora_ga")
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


def check_adapter(folder: Path, config: LoraConfig, shape: ModelShape) -> None:
    """Checks that an adapter is plain LoRA on all linears of the decoder layers, with r and alpha of the config.

    Raises:
        UserError: a file is missing or damaged, or a setting or tensor does not fit. The line names it.
    """
    settings = read_json(folder / ADAPTER_FILE)
    start = str(settings.get("init_lora_weights"))
    targets = settings.get("target_modules") or []
    named = last_names([*targets, *(settings.get("target_parameters") or [])])
    needed = last_names(x.stock_name if x.stack else x.linear for _, x in shape.linears() if x.runs)
    missing = sorted(set(needed) - set(named))
    refusals = {
        "is not a plain LoRA adapter": settings.get("peft_type") != "LORA"
        or any(map(settings.get, VARIANTS)),
        "trains biases, which is not supported": settings.get("bias", "none") != "none",
        "has ranks or alphas per module, which is not supported": any(map(settings.get, PATTERNS)),
        "trains more than LoRA (modules_to_save), which is not supported": settings.get(
            "modules_to_save"
        ),
        f"began with init_lora_weights {start}, which changes the base weights; save it with PEFT's "
        "path_initial_model_for_weight_conversion, or merge it": start.startswith(
            STARTS_THAT_CHANGE_W
        ),
        f"has r {settings.get('r')}; the run config says lora.r {config.r}": settings.get("r")
        != config.r,
        f"has lora_alpha {settings.get('lora_alpha')}; the run config says lora.lora_alpha {config.lora_alpha}": (
            settings.get("lora_alpha") != config.lora_alpha
        ),
        f"has no LoRA on {', '.join(missing)}; the criterion needs it on all linears that it scores": (
            missing and not isinstance(targets, str)  # a pattern. Its tensors are checked below
        ),
    }
    for reason, applies in refusals.items():
        if applies:
            raise UserError(f"model.adapter {folder} {reason}")
    _check_tensors(folder / ADAPTER_WEIGHTS, config.r, shape)


def _check_tensors(path: Path, r: int, shape: ModelShape) -> None:
    require(path.is_file(), f"{path} does not exist")
    on_disk = {name: shape for name, (shape, _) in read_header(path).items()}
    expected = {
        name_in_file(shape, layer, name): tuple(factor.shape)
        for layer in range(len(shape.layers))
        for name, factor in _factors_in_peft(_with_lora(shape, layer, on_disk), r).items()
    }
    if different := sorted(expected.keys() ^ on_disk.keys()):
        verb = "lacks" if different[0] in expected else "has"
        raise UserError(f"{path} does not fit the model: it {verb} {different[0]}")
    for name, sizes in on_disk.items():
        if sizes != expected[name]:
            raise UserError(
                f"{path} does not fit the model: {name} has shape {[*sizes]}, not {[*expected[name]]}"
            )


def _with_lora(shape: ModelShape, layer: int, names: Collection[str]) -> list[TensorSpec]:
    """Lists the linears of a layer with LoRA in an adapter's file with these `names`. Whole linears may lack it."""
    return [
        x
        for x in shape.layers[layer].linears
        if x.runs or name_in_file(shape, layer, f"{x.linear}.lora_A") in names
    ]


def _factors_in_peft(linears: Iterable[TensorSpec], r: int) -> dict[str, Tensor]:
    factors = {
        f"{linear.linear}.lora_{which}": torch.empty(size, device="meta")
        for linear in linears
        for which, size in zip("AB", linear.lora_shapes(r), strict=True)
    }
    return as_in_peft(factors, linears)


def load_adapter(model: PeftModel, folder: Path, shape: ModelShape, r: int) -> None:
    """Copies the weights of a checked adapter into the wrapped model, before ZeRO-3 shards them."""
    saved, own = load_file(folder / ADAPTER_WEIGHTS), dict[str, Tensor]()
    for layer in range(len(shape.layers)):
        linears = _with_lora(shape, layer, saved)
        factors = {
            name: saved[name_in_file(shape, layer, name)] for name in _factors_in_peft(linears, r)
        }
        ours = as_in_peft(factors, linears, back=True)
        own |= {name_in_file(shape, layer, name): factor for name, factor in ours.items()}
    result = set_peft_model_state_dict(model, own)
    assert not result.unexpected_keys, result.unexpected_keys


def name_in_file(shape: ModelShape, layer: int, name: str) -> str:
    """Returns the name of a LoRA factor ("self_attn.q_proj.lora_A") in PEFT's adapter_model.safetensors."""
    return f"base_model.model.{shape.prefix(layer)}{name}.weight"


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
        setattr(owner, attribute.name, attribute.run.size // attribute.ranges)
