"""Loads bases as bitsandbytes holds them, with LoRA."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from loraprune_ds import linear_names

# The inputs of down_proj are no multiple of 64, and bitsandbytes' CPU kernels are wrong for 96 of them.
SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "hidden": 64, "ffn": 96, "layers": 3}
NF4_BITS: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.bfloat16,
}
DOUBLE = NF4_BITS | {"bnb_4bit_use_double_quant": True}
EIGHT: dict[str, Any] = {"load_in_8bit": True}


def load(folder: Path, bits: dict[str, Any] | None, **more: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder,
        **{"dtype": torch.bfloat16} | more,
        quantization_config=bits and BitsAndBytesConfig(**bits),
    )


def with_lora(base: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"target_modules": linear_names(base), "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | settings | more))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data *= 0.1
    return model


def stored_and_loaded(out: Path, folder: Path, bits: dict[str, Any] = DOUBLE) -> Any:
    load(folder, bits).save_pretrained(out)
    return AutoModelForCausalLM.from_pretrained(out)
