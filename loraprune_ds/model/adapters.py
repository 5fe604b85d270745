"""PEFT LoRA on all linears of every decoder layer, fresh or from an existing adapter."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.model.experts import ExpertLora, ExpertStack, as_in_peft, from_peft, in_peft
from loraprune_ds.model.family_row import Linear
from loraprune_ds.model.lora_product import OneProduct
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.shapes import ModelShape

BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"  # of an export that keeps the two apart
ADAPTER = "default"
ADAPTER_FILE = "adapter_config.json"
VARIANTS = ("use_dora", "use_rslora", "alora_invocation_tokens")  # each computes something else
STARTS_THAT_CHANGE_W = ("pissa", "olora", "corda", "loftq", "lora_ga")
WHOLE_LAYER = 4096  # the largest hidden_size of which whole layers are gathered: 0.4 GB in bf16 for LLaMA-7B


def add_lora(model: PreTrainedModel, shape: ModelShape, config: LoraConfig, seed: int) -> PeftModel:
    """Wraps the model. A is drawn from `seed` alone, so it is the same on any number of ranks. B is zero.

    The adapters keep the model's dtype, without a silent upcast. Their fp32 masters belong to the optimizer. Linears
    are named in full, so that no other linear with the same last name is touched.
    """
    torch.manual_seed(seed)
    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=cast(int, config.lora_alpha),  # PEFT types it int and divides it as a float
        lora_dropout=config.lora_dropout,
        target_modules=[f"model.layers.{i}.{linear.name}" for i, linear in shape.linear_ids()],
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft_config._register_custom_module({ExpertStack: ExpertLora, nn.Linear: OneProduct})
    wrapped = get_peft_model(model, peft_config, autocast_adapter_dtype=False)
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(model.dtype)  # beside an int8 weight PEFT leaves it in fp32
    return cast(PeftModel, wrapped)


def gathered_whole(layer: nn.Module, shape: ModelShape) -> list[nn.Module]:
    """Lists the modules of a decoder layer that ZeRO-3 gathers as one: the layer itself, or each linear with its LoRA.

    The layer is cheaper for the host: PEFT makes 40 modules of it. But what is gathered together is also copied, so a
    rank holds it twice for a moment. No cut changes the choice. It would change the order of a sum.
    """
    if shape.hidden_size <= WHOLE_LAYER:
        return [layer]
    return [module for module in layer.modules() if isinstance(module, LoraLinear)]


def differentiate_input(layer: nn.Module) -> None:
    """Has the backward pass go on to the input of a decoder layer, although nothing before the first one is trained.

    DeepSpeed reduces the gradients of a layer that is gathered whole as soon as the gradient of its input is there.
    """

    def differentiate(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0].detach()
        return (hidden.requires_grad_() if torch.is_grad_enabled() else hidden, *inputs[1:])

    layer.register_forward_pre_hook(differentiate)


def check_adapter(folder: Path, config: LoraConfig, shape: ModelShape) -> None:
    """Checks that a run can start from an existing adapter.

    It must be plain LoRA on all linears of the decoder layers, with the same r and alpha.

    Raises:
        UserError: it cannot. The line names the folder and what does not fit.
    """
    found = read_json(folder / ADAPTER_FILE)
    if found.get("peft_type") != "LORA" or any(map(found.get, VARIANTS)):
        raise UserError(f"model.adapter {folder} is not a plain LoRA adapter")
    if found.get("bias", "none") != "none" or found.get("rank_pattern") or found.get("alpha_pattern"):
        raise UserError(f"model.adapter {folder}: trained biases and per-module ranks or alphas are not supported")
    if found.get("modules_to_save"):
        raise UserError(f"model.adapter {folder}: trained modules beside LoRA (modules_to_save) are not supported")
    start = str(found.get("init_lora_weights"))
    if start.startswith(STARTS_THAT_CHANGE_W):
        raise UserError(
            f"model.adapter {folder} began with init_lora_weights {start}, which changes the weights beside it; save "
            "it with PEFT's path_initial_model_for_weight_conversion, or merge it into its model"
        )
    for key, expected in (("r", config.r), ("lora_alpha", config.lora_alpha)):
        if found.get(key) != expected:
            raise UserError(
                f"model.adapter {folder} has {key} {found.get(key)}; the run config says lora.{key} {expected}"
            )
    targets = found.get("target_modules") or []
    # A pattern says nothing by itself, unlike a list. Its tensors will (check_adapter_tensors).
    named = last_names([*targets, *(found.get("target_parameters") or [])])
    needed = last_names(in_peft(x).tensor if x.is_stack else x.name for _, x in shape.linear_ids())
    missing = set() if isinstance(targets, str) else set(needed) - set(named)
    if missing:
        raise UserError(
            f"model.adapter {folder} has no LoRA on {', '.join(sorted(missing))}; the criterion "
            "needs it on all linears of a decoder layer"
        )


def check_adapter_tensors(folder: Path, r: int, shape: ModelShape) -> None:
    """Checks that an existing adapter fits the model of `shape`. Only the file's header is read.

    Raises:
        UserError: the file is missing or damaged. A tensor is missing, too many or of another shape.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:  # the length of the file fits its header, too
            found = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    expected = _tensor_shapes(shape, r)
    if different := sorted(expected.keys() ^ found.keys()):
        verb = "lacks" if different[0] in expected else "has"
        raise UserError(f"{path} does not fit the model: it {verb} {different[0]}")
    for name, sizes in found.items():
        if sizes != expected[name]:
            raise UserError(f"{path} does not fit the model: {name} has shape {sizes}, not {expected[name]}")


def _tensor_shapes(shape: ModelShape, r: int) -> dict[str, list[int]]:
    """Returns the shapes by the names in PEFT's adapter_model.safetensors."""
    return {
        name_in_file(layer, name): list(factor.shape)
        for layer in range(len(shape.layers))
        for name, factor in _factors_in_peft(shape, layer, r).items()
    }


def _factors_in_peft(shape: ModelShape, layer: int, r: int) -> dict[str, Tensor]:
    """Returns the factors of a layer as PEFT has them, without content."""
    factors: dict[str, Tensor] = {}
    for linear in shape.linears(layer):
        for which, size in zip("AB", shape.lora_shapes(layer, linear, r), strict=True):
            factors[f"{linear.name}.lora_{which}"] = torch.empty(size, device="meta")
    return as_in_peft(factors, shape.linears(layer))


def load_adapter(model: PeftModel, folder: Path, shape: ModelShape, r: int) -> None:
    """Copies the weights of a checked adapter into the wrapped model, before ZeRO-3 shards them."""
    saved, own = load_file(folder / "adapter_model.safetensors"), dict[str, Tensor]()
    for layer in range(len(shape.layers)):
        factors = {name: saved[name_in_file(layer, name)] for name in _factors_in_peft(shape, layer, r)}
        factors = from_peft(factors, shape.linears(layer), r)
        own |= {name_in_file(layer, name): factor for name, factor in factors.items()}
    result = set_peft_model_state_dict(model, own)
    missing = [name for name in result.missing_keys if "lora_" in name]
    assert not missing, missing
    assert not result.unexpected_keys, result.unexpected_keys


def name_in_file(layer: int, name: str) -> str:
    """Returns the name of a LoRA factor ("{path}.lora_A") in PEFT's adapter_model.safetensors."""
    return f"base_model.model.model.layers.{layer}.{name}.weight"


def lora_linear(layer: nn.Module, linear: Linear) -> LoraLinear:
    """Returns PEFT's wrapper around one linear of a decoder layer."""
    module = layer.get_submodule(linear.name)
    assert isinstance(module, LoraLinear)
    return module


def lora_weights(module: LoraLinear, adapter: str = ADAPTER) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns the parameters A (r, in_features) and B (out_features, r)."""
    a, b = (cast(nn.Linear, factors[adapter]).weight for factors in (module.lora_A, module.lora_B))
    return cast(nn.Parameter, a), cast(nn.Parameter, b)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Lets the base model alone compute while this is open.

    PEFT's own `disable_adapter` also takes the gradients from LoRA's parameters. ZeRO-3 has its hooks on these.
    """
    modules = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for module in modules:
        module._disable_adapters = True
        assert module.disable_adapters, "PEFT reads another switch now"
    try:
        yield
    finally:
        for module in modules:
            module._disable_adapters = False


def last_names(names: Iterable[str]) -> list[str]:
    """Returns the last parts of names, each once, as PEFT's `target_modules` usually has them."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def base_parameter(layer: nn.Module, name: str) -> nn.Parameter:
    """Returns a parameter of a decoder layer by its name in the weight files, past PEFT's wrappers."""
    path, _, attribute = name.rpartition(".")
    module = layer.get_submodule(path)
    return cast(nn.Parameter, getattr(module.base_layer if isinstance(module, LoraLinear) else module, attribute))


def plain_parameter(module: nn.Module, name: str, *, trained: bool) -> nn.Parameter:
    """Returns a parameter that has no LoRA, past the wrappers of PEFT's `modules_to_save`.

    Args:
        trained: of a module that is trained whole, its copy that is. Else what it began with.
    """
    path, _, attribute = name.rpartition(".")
    found = module.get_submodule(path)
    if isinstance(found, ModulesToSaveWrapper):
        found = found.modules_to_save[ADAPTER] if trained else found.original_module
    return cast(nn.Parameter, getattr(found, attribute))


def set_runtime_counts(layer: nn.Module, shape: ModelShape, counts: LayerShape) -> None:
    """Tells a live layer the counts that its forward reads. A config that layers share becomes the layer's own."""
    for runtime in (x for x in shape.family.runtime if x.kind in counts.kinds):
        path, _, last = runtime.module.rpartition(".")
        holder = layer.get_submodule(path)
        owner: Any = getattr(holder, last)
        if not isinstance(owner, nn.Module):
            owner = copy.copy(owner)
            setattr(holder, last, owner)
        setattr(owner, runtime.attribute, counts[runtime.kind] * shape.width(runtime.width))


def set_features(module: LoraLinear, out_features: int, in_features: int) -> None:
    """Tells a cut linear and its PEFT wrappers their new sizes. repr, merge and save read them."""
    for holder in (cast(nn.Linear, module.base_layer), module):
        holder.out_features, holder.in_features = out_features, in_features
    for adapter in module.lora_A:
        lora_a, lora_b = (cast(nn.Linear, factors[adapter]) for factors in (module.lora_A, module.lora_B))
        lora_a.in_features, lora_b.out_features = in_features, out_features
        if isinstance(module, ExpertLora):
            lora_a.out_features = cast(ExpertStack, module.base_layer).experts * lora_b.in_features
