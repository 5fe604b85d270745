"""A tiny LLaMA and the Phi-3 with its q, k, v and its gate, up fused have the same scores and lose the same groups."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraprune_ds.config import Criterion, PruneConfig
from loraprune_ds.model.pretrained import open_pretrained
from tests.oracle.models import make_batches, make_tiny_llama
from tests.unit.plain_training import PlainRun, fresh_lora

STEPS, VOCAB = 4, 97
FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}


def fuse(llama: Path, folder: Path) -> Path:
    """Writes the LLaMA as a Phi-3 that computes the same."""
    shutil.copytree(llama, folder)
    config, tensors = json.loads((llama / "config.json").read_text()), load_file(llama / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for name, parts in FUSED.items():
            block = f"model.layers.{layer}.{name.partition('.')[0]}"
            weights = [tensors.pop(f"{block}.{part}_proj.weight") for part in parts]
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.cat(weights)
    for name in ("attention_bias", "mlp_bias", "architectures"):
        config.pop(name, None)
    config |= {"model_type": "phi3", "original_max_position_embeddings": config["max_position_embeddings"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("criterion", ["lora", "magnitude"])
def test_fused_linears_score_as_their_parts(tmp_path: Path, criterion: Criterion) -> None:
    llama = tmp_path / "llama"  # head_dim is hidden_size / heads, as Phi-3 needs it
    make_tiny_llama(llama, heads=10, kv_heads=5, head_dim=6, hidden=60, ffn=23, layers=2, vocab=VOCAB, seed=1)
    batches = make_batches(steps=STEPS, samples=6, tokens=16, vocab=VOCAB, seed=3)
    prune = PruneConfig(
        criterion=criterion, ratio=0.4, prune_every=2, protected_first=0, protected_last=0, channel_multiple=1
    )
    folders = (llama, fuse(llama, tmp_path / "phi3"))
    loras = [fresh_lora(open_pretrained(folder).shape) for folder in folders]  # the linears of a layer share one A
    split, fused = (
        PlainRun(folder, lora, prune, STEPS, learning_rate=0.0, dtype=torch.float64).run(batches)
        for folder, lora in zip(folders, loras, strict=True)
    )
    assert len(split.cuts) >= 2
    assert fused.kept() == split.kept()
    for wanted, found in zip(split.averages[0], fused.averages[0], strict=True):
        for kind in (0, 1):
            torch.testing.assert_close(found[kind], wanted[kind], rtol=1e-9, atol=0)  # fp64, other kernels
