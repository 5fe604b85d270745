"""Compares what a pruned training wrote with the dense model it began with, in one process."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loraprune_ds.files import read_json

# fp32: merging and the smaller sums round in another order than the live model. Rounding alone gives about 1e-6.
TOLERANCE = 1e-5
LINEARS = {
    "self_attn.q_proj": ("queries", 0),
    "self_attn.k_proj": ("heads", 0),
    "self_attn.v_proj": ("heads", 0),
    "self_attn.o_proj": ("queries", 1),
    "mlp.gate_proj": ("channels", 0),
    "mlp.up_proj": ("channels", 0),
    "mlp.down_proj": ("channels", 1),
}


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=True
    ).eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def kept_indices(out: Path, dense: Any) -> list[dict[str, Tensor]]:
    """Returns per layer the kept rows of q_proj (queries) and k_proj (heads), and the kept channels."""
    head_dim = dense.config.head_dim or dense.config.hidden_size // dense.config.num_attention_heads
    per_head = dense.config.num_attention_heads // dense.config.num_key_value_heads
    found = []
    for layer in read_json(out / "kept_groups.json")["layers"]:
        heads = torch.tensor(layer["heads"])[:, None]
        rows = {
            name: (heads * width + torch.arange(width)).flatten()
            for name, width in (("queries", head_dim * per_head), ("heads", head_dim))
        }
        found.append(rows | {"channels": torch.tensor(layer["channels"])})
    return found


def is_slice(base: Any, dense: Any, kept: list[dict[str, Tensor]]) -> bool:
    """Returns whether the linears that lost outputs are slices of the dense ones, bit by bit. A refit spares them."""
    return all(
        torch.equal(weight(dense, i, name).index_select(axis, rows[kind]), weight(base, i, name))
        for i, rows in enumerate(kept)
        for name, (kind, axis) in LINEARS.items()
        if axis == 0
    )


@torch.no_grad()
def masked(dense: Any, merged: Any, kept: list[dict[str, Tensor]]) -> Any:
    """Gives the dense model the merged weights, and zeros for what reads a removed group. Changes and returns it."""
    for i, rows in enumerate(kept):
        for name, (kind, axis) in LINEARS.items():
            whole = weight(dense, i, name)
            if axis == 1:
                whole.zero_()
            whole.index_copy_(axis, rows[kind], weight(merged, i, name))
    return dense


def weight(model: Any, layer: int, name: str) -> nn.Parameter:
    return model.model.layers[layer].get_submodule(name).weight


def check_results(model: Path, out: Path, ids: Tensor, live: Tensor, *, has_adapter: bool) -> None:
    """Compares the folders `base`, `model` and the adapter in `out` with the dense model and the live logits."""
    dense, base, merged = load(model), load(out / "base"), load(out / "model")
    kept = kept_indices(out, dense)
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in dense.parameters())
    assert is_slice(base, dense, kept)
    assert relative(logits(merged, ids), live) < TOLERANCE
    assert relative(logits(masked(dense, merged, kept), ids), logits(merged, ids)) < TOLERANCE
    if has_adapter:
        assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == str(
            out / "base"
        )
        adapted = PeftModel.from_pretrained(base, out).eval()
        assert relative(logits(adapted, ids), live) < TOLERANCE
        assert relative(logits(adapted.merge_and_unload(), ids), live) < TOLERANCE
