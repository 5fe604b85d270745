"""Rewrites a stock LLaMA as a model of another family that computes the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Tokenizer

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def llama(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Changes nothing."""
    return {}, tensors


def mistral(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Changes nothing but the name."""
    return {"sliding_window": None}, tensors


def qwen2(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Adds zero biases to q_proj, k_proj and v_proj."""
    biases = {
        name.replace(".weight", ".bias"): torch.zeros(len(tensor), dtype=tensor.dtype)
        for name, tensor in tensors.items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return {"use_sliding_window": False}, tensors | biases


def granite(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Sets the multipliers to one, and that of attention to head_dim ** -0.5."""
    ones = dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), 1.0)
    return ones | {"attention_multiplier": config["head_dim"] ** -0.5}, tensors


def phi3(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Fuses q, k and v, and gate and up. So each of these shares one LoRA A."""
    fused = dict(tensors)
    for layer in range(config["num_hidden_layers"]):
        for name, parts in (("self_attn.qkv", ("q", "k", "v")), ("mlp.gate_up", ("gate", "up"))):
            block, _, last = name.rpartition(".")
            weights = [fused.pop(f"model.layers.{layer}.{block}.{part}_proj.weight") for part in parts]
            fused[f"model.layers.{layer}.{block}.{last}_proj.weight"] = torch.cat(weights)
    return {"original_max_position_embeddings": config["max_position_embeddings"], "sliding_window": None}, fused


CLOTHES: dict[str, Callable[[Config, Tensors], tuple[Config, Tensors]]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "granite": granite,
    "phi3": phi3,
}


def dress(source: Path, family: str, folder: Path) -> Path:
    """Writes the LLaMA in `source` as a model of another family, with a tokenizer for it. Returns its folder.

    transformers splits the text of every `qwen2` in Qwen2's way, as config.json names that type. So that all read the
    same tokens, all split it in this way.
    """
    rewrite(source, family, folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(source)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def rewrite(source: Path, family: str, folder: Path) -> Path:
    """Writes the LLaMA without biases in `source` as a model of another family. Returns its folder."""
    shutil.copytree(source, folder)
    config: Config = json.loads((source / "config.json").read_text())
    changes, tensors = CLOTHES[family](config, load_file(source / "model.safetensors"))
    for name in ("attention_bias", "mlp_bias", "architectures"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | changes | {"model_type": family}, indent=2))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
