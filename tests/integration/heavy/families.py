"""Cuts tiny random models of all families, for the tools that serve such models."""

from pathlib import Path
from typing import Any

import yaml

from loraprune_ds.export.huggingface import copy_tokenizer
from loraprune_ds.model.family import FAMILIES
from tests.support.export_cases import VOCAB
from tests.support.family_cuts import Export, export

# Rows that Q8_0 can hold. After a cut to 2 of 4 groups, heads have 64 rows and hidden_size // query heads is 24.
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 128}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
KEPT, KEPT_EXPERTS = (2, 96), (2, 7)
# llama.cpp takes a qwen2_moe's q_proj for hidden_size x hidden_size, and vLLM that of a granitemoe, too.
SQUARE, ALL_HEADS = ("qwen2_moe", "granitemoe", "cohere", "lfm2"), (4, 7)
# Those whose layers of one size vLLM serves, as test_vllm.py shows, and by which implementation.
# vLLM 0.32 computes even an uncut deepseek_v3 otherwise on a CPU, by 17 in a log probability. The others wait.
# It also ignores the correction of an ernie4_5_moe's router there: without it the logits are equal.
# Its transformers lacks internlm3 and iquestcoder. It has no encoder-decoders of text.
NOT_ASKED = "deepseek_v3 apertus qwen3_5_text qwen3_5_moe_text qwen3_next internlm3 iquestcoder minimax_m2".split()
NOT_ASKED += "deepseek_v2 glm4_moe_lite lfm2 helium granitemoehybrid nemotron_h gemma4_text t5 mt5 umt5".split()
NOT_ASKED += (
    "ernie4_5_moe dots1 hunyuan_v1_moe lfm3 lfm2_moe glm_moe_dsa mistral4 muse_glimmer_text".split()
)
VLLM: dict[str, str] = {
    name: family.vllm for name, family in FAMILIES.items() if name not in NOT_ASKED
}
VLLM_ANY_LAYERS = ("llama",)  # asked with SmolLM2, whose layers then differ
_FILE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("families.yaml").read_text())
GROUPS: dict[str, int] = _FILE["groups"]
SPECIAL: dict[str, dict[str, Any]] = _FILE["families"]


def serve(
    family: str, folder: Path, tokenizer: Path, *counts: tuple[int, int], **changes: Any
) -> Export:
    """Writes the export of a cut model, with a tokenizer. Without counts all layers keep KEPT."""
    settings = SIZES | SPECIAL.get(family, {}) | changes
    kept = ALL_HEADS if family in SQUARE else KEPT_EXPERTS if FAMILIES[family].has_experts else KEPT
    layers = settings.get("num_hidden_layers", 2) + settings.get("num_decoder_layers", 0)
    made = export(family, folder, *counts or [kept] * layers, **settings)
    copy_tokenizer(tokenizer, folder)
    return made


def deep(layers: int, period: int) -> dict[str, Any]:
    """Returns the settings of a deep model. Each of number `period` attends to all tokens."""
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": types}
