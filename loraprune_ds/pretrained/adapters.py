"""Checks and reads a LoRA adapter on disk, as PEFT writes it."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject, read_json, write_json
from loraprune_ds.model.adapters import last_names, target_modules
from loraprune_ds.model.experts import as_in_peft
from loraprune_ds.model.groups import Shape, TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, read_header, write_weight_file

# folders of an export with unmerged LoRA
BASE_FOLDER = "base"
ADAPTER_FOLDER = "adapter"
ADAPTER_FILE = "adapter_config.json"
# variants that compute something else
VARIANTS = ("use_dora", "use_rslora", "alora_invocation_tokens")
PATTERNS = ("rank_pattern", "alpha_pattern")
STARTS_THAT_CHANGE_W = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_adapter(folder: Path, config: LoraConfig, shape: ModelShape) -> None:
    """Checks that an adapter is plain LoRA on all linears of the decoder layers, with r and alpha of the config.

    Raises:
        UserError: a file is missing or damaged, or a setting or tensor does not fit. The line names it.
    """
    settings = read_json(folder / ADAPTER_FILE)
    targets = settings.get("target_modules") or []
    stacks = settings.get("target_parameters") or []
    trained = last_names([*targets, *stacks])
    scored = [x for _, x in shape.linears() if x.spans]
    needed = last_names(x.stock_name if x.stack else x.linear for x in scored)
    missing = sorted(set(needed) - set(trained))
    if isinstance(targets, str):  # a pattern. The tensors are checked below
        missing = []
    fault = next(_faults(settings, config, missing), None)
    if fault is not None:
        raise UserError(f"model.adapter {folder} {fault}")
    _check_tensors(folder / ADAPTER_WEIGHTS, config.r, shape)


def _faults(settings: Mapping[str, Any], config: LoraConfig, missing: list[str]) -> Iterator[str]:
    """Yields the faults of an adapter, the most general first. `missing` names linears without LoRA."""
    r = settings.get("r")
    alpha = settings.get("lora_alpha")
    start = str(settings.get("init_lora_weights"))
    if settings.get("peft_type") != "LORA" or any(map(settings.get, VARIANTS)):
        yield "is not a plain LoRA adapter"
    if settings.get("bias", "none") != "none":
        yield "trains biases, which is not supported"
    if any(map(settings.get, PATTERNS)):
        yield "has ranks or alphas per module, which is not supported"
    if settings.get("modules_to_save"):
        yield "trains more than LoRA (modules_to_save), which is not supported"
    if start.startswith(STARTS_THAT_CHANGE_W):
        yield (
            f"began with init_lora_weights {start}, which changes the base weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion, or merge it"
        )
    if r != config.r:
        yield f"has r {r}; the run config says lora.r {config.r}"
    if alpha != config.lora_alpha:
        yield f"has lora_alpha {alpha}; the run config says lora.lora_alpha {config.lora_alpha}"
    if missing:
        yield f"has no LoRA on {', '.join(missing)}; the criterion needs it on all linears that it scores"


def _check_tensors(path: Path, r: int, shape: ModelShape) -> None:
    require(path.is_file(), f"{path} does not exist")
    stored = {name: sizes for name, (sizes, _) in read_header(path).items()}
    expected: dict[str, Shape] = {}
    for layer in range(len(shape.layers)):
        expected |= _shapes_in_file(shape, layer, _with_lora(shape, layer, stored), r)
    different = sorted(expected.keys() ^ stored.keys())
    if different:
        verb = "lacks" if different[0] in expected else "has"
        raise UserError(f"{path} does not fit the model: it {verb} {different[0]}")
    for name, sizes in stored.items():
        needed = expected[name]
        require(
            sizes == needed,
            f"{path} does not fit the model: {name} has shape {[*sizes]}, not {[*needed]}",
        )


def _with_lora(shape: ModelShape, layer: int, names: Collection[str]) -> list[TensorSpec]:
    """Lists the linears of a layer with LoRA in an adapter's file with these `names`. Whole linears may lack it."""
    return [
        linear
        for linear in shape.layers[layer].linears
        if linear.spans or name_in_file(shape, layer, f"{linear.linear}.lora_A") in names
    ]


def _factors_in_peft(linears: list[TensorSpec], r: int) -> dict[str, Tensor]:
    """Returns the factors of these linears under PEFT's names, without values."""
    factors: dict[str, Tensor] = {}
    for linear in linears:
        a, b = linear.lora_shapes(r)
        factors[f"{linear.linear}.lora_A"] = torch.empty(a, device="meta")
        factors[f"{linear.linear}.lora_B"] = torch.empty(b, device="meta")
    return as_in_peft(factors, linears)


def _shapes_in_file(
    shape: ModelShape, layer: int, linears: list[TensorSpec], r: int
) -> dict[str, Shape]:
    factors = _factors_in_peft(linears, r)
    return {name_in_file(shape, layer, name): tuple(x.shape) for name, x in factors.items()}


def load_adapter(model: PeftModel, folder: Path, shape: ModelShape, r: int) -> None:
    """Copies the weights of a checked adapter into the wrapped model, before ZeRO-3 shards them."""
    stored = load_file(folder / ADAPTER_WEIGHTS)
    state: dict[str, Tensor] = {}
    for layer in range(len(shape.layers)):
        linears = _with_lora(shape, layer, stored)
        names = _factors_in_peft(linears, r)
        factors = {name: stored[name_in_file(shape, layer, name)] for name in names}
        for name, factor in as_in_peft(factors, linears, back=True).items():
            state[name_in_file(shape, layer, name)] = factor
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys, result.unexpected_keys


def name_in_file(shape: ModelShape, layer: int, name: str) -> str:
    """Returns the name of a LoRA factor ("self_attn.q_proj.lora_A") in PEFT's adapter_model.safetensors."""
    return f"base_model.model.{shape.prefix(layer)}{name}.weight"


def stock_targets(shape: ModelShape) -> JsonObject:
    """Returns PEFT's settings that put LoRA on all linears of a stock model of this shape."""
    linears = list({linear.linear: linear for _, linear in shape.linears()}.values())
    stacks = [linear.stock_name for linear in linears if linear.stack]
    if not stacks:
        return {"target_modules": target_modules(shape)}
    # PEFT has no dropout on tensors without a module, and would take the modules of a dense MLP for experts.
    return {
        "target_modules": [x.linear for x in linears if x.spans and not x.stack],
        "target_parameters": [*stacks, *(x.name for x in linears if not x.spans)],
        "lora_dropout": 0.0,
    }


def give_base(folder: Path, base: str, shape: ModelShape) -> None:
    """Makes an adapter that a live model has written name its pruned base, and one that PEFT alone loads.

    Args:
        shape: of the pruned model.
    """
    config = read_json(folder / ADAPTER_FILE)
    path = folder / ADAPTER_WEIGHTS
    changes = {"base_model_name_or_path": base}
    if any(linear.stack for _, linear in shape.linears()) and not config.get("target_parameters"):
        new = folder / f"{ADAPTER_WEIGHTS}.new"
        write_weight_file(new, _with_stock_names(load_file(path), shape))
        new.replace(path)
        changes |= stock_targets(shape)
    write_json(folder / ADAPTER_FILE, config | changes)


def _with_stock_names(stored: dict[str, Tensor], shape: ModelShape) -> dict[str, Tensor]:
    tensors = dict(stored)
    for layer, spec in enumerate(shape.layers):
        stacks = [linear for linear in spec.linears if linear.stack]
        names = [
            f"{linear.linear}.{factor}" for linear in stacks for factor in ("lora_A", "lora_B")
        ]
        factors = {name: tensors.pop(name_in_file(shape, layer, name)) for name in names}
        for name, factor in as_in_peft(factors, stacks).items():
            tensors[name_in_file(shape, layer, name)] = factor
    return tensors
