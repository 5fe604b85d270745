"""Adds layers that predict further tokens to a model on disk."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from loraprune_ds.model.classes import causal_lm_class, config_object
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.support.families import SIZES

HIDDEN, HEADS = SIZES["hidden_size"], SIZES["num_key_value_heads"]
OTHERS = {"fc": (HIDDEN, 2 * HIDDEN), "norm": (HIDDEN,), "pre_fc_norm_embedding": (HIDDEN,)}
OTHERS |= {"pre_fc_norm_hidden": (HIDDEN,)}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def as_head(config: dict[str, Any], count: int) -> dict[str, Any]:
    """Describes a causal LM that has only layers for further tokens."""
    return config | {"num_hidden_layers": count, "layer_types": ["full_attention"] * count}


def make_head(config: dict[str, Any], count: int) -> PreTrainedModel:
    torch.manual_seed(7)
    model: Any = causal_lm_class(config["model_type"])
    model = model._from_config(config_object(as_head(config, count)), **EAGER).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).mul(0.25).bfloat16().float()
    return model


def add_head(folder: Path, count: int, *, fused: bool = False) -> PreTrainedModel:
    """Puts layers for further tokens in bf16 beside the tensors of a model. Returns them."""
    head = make_head(open_pretrained(folder).config, count)
    head.save_pretrained(folder / "head")
    layers = load_file(folder / "head" / "model.safetensors")
    if fused:
        layers = {name: x for name, x in layers.items() if ".experts." not in name}
        layers |= {name: x.detach() for name, x in head.named_parameters() if ".experts." in name}
    shutil.rmtree(folder / "head")
    tensors = {
        f"mtp.{name.removeprefix('model.')}": x
        for name, x in layers.items()
        if "model.layers" in name
    }
    tensors |= {f"mtp.{name}.weight": torch.randn(size) for name, size in OTHERS.items()}
    tensors = load_file(folder / "model.safetensors") | {
        name: x.bfloat16() for name, x in tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return head
