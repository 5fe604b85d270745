"""Checks and reads a LoRA adapter on disk, as PEFT writes it."""

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json
from loraprune_ds.model.adapters import last_names
from loraprune_ds.model.experts import as_in_peft
from loraprune_ds.model.groups import TensorSpec
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.weight_files import ADAPTER_WEIGHTS, read_header

BASE_FOLDER, ADAPTER_FOLDER = "base", "adapter"  # folders of an export with unmerged LoRA
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
    start = str(settings.get("init_lora_weights"))
    targets = settings.get("target_modules") or []
    named = last_names([*targets, *(settings.get("target_parameters") or [])])
    needed = last_names(
        x.stock_name if x.stack else x.linear for _, x in shape.linears() if x.spans
    )
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
        if x.spans or name_in_file(shape, layer, f"{x.linear}.lora_A") in names
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
