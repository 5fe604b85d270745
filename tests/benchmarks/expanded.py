"""Repeats the key-value heads of a model, as the published code needs them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def expanded_model(source: Path, folder: Path) -> Path:
    """Writes the model into `folder`, unless it is there. It computes the same (SmolLM2: 9 + 9 heads for 9 + 3)."""
    if folder.exists():
        return folder
    config = json.loads((source / "config.json").read_text())
    kv_heads = config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    repeats = config["num_attention_heads"] // kv_heads
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            tensors[name] = repeat_heads(tensor, kv_heads, head_dim, repeats)
    staging = folder.with_suffix(".partial")  # whole or not at all
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(source, staging, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config["num_key_value_heads"] = config["num_attention_heads"]
    (staging / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, staging / "model.safetensors", {"format": "pt"})
    staging.rename(folder)
    return folder


def repeat_heads(weight: Tensor, kv_heads: int, head_dim: int, repeats: int) -> Tensor:
    """Repeats the heads of a weight or a bias: (kv_heads * head_dim, ...) -> (kv_heads * repeats * head_dim, ...)."""
    heads = weight.view(kv_heads, head_dim, -1)
    return (
        torch.repeat_interleave(heads, repeats, dim=0).reshape(-1, *weight.shape[1:]).contiguous()
    )
