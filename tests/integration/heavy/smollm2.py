"""Cuts SmolLM2-135M, the embedded model, to stock shapes and to per-layer shapes with odd widths."""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.pretrained.sources import embedded_model_dir
from tests.support.export_cases import Case, export

SIZES = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
}
ODD = [(3 - i % 9 // 8, (1536, 1488, 1409)[i % 3]) for i in range(30)]
DENSE = Case("smollm2", "llama", SIZES, [(3, 1536)] * 30, "llama", "bfloat16")
PRUNED = [
    Case("smollm2_uniform", "llama", SIZES, [(2, 1301)] * 30, "llama", "bfloat16"),
    Case("smollm2_layers", "llama", SIZES, ODD, "pruned_llama", "bfloat16"),
]
# 39.6 % of the linears are gone
STOCK = Case("smollm2_stock", "llama", SIZES, [(2, 896)] * 30, "llama", "bfloat16")
LONG_TEXT = topics["while"] + topics["numbers"] + topics["import"]


def write(case: Case, folder: Path, layers: int | None = None) -> None:
    """Exports the embedded model, or its first layers, cut to a case."""
    dense = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32)
    dense.model.layers = dense.model.layers[:layers]
    dense.config.num_hidden_layers = len(dense.model.layers)
    export(dense, case, embedded_model_dir(), folder)
