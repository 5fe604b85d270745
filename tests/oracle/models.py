"""Makes random tiny models, adapters and batches for any test, without code of the package."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
LINEARS = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
# that 2 and 4 ranks do not divide
ODD_SIZES: dict[str, Any] = {"heads": 6, "kv_heads": 3, "hidden": 42, "ffn": 45, "layers": 3}


def make_tiny_llama(
    folder: Path,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    hidden: int = 32,
    ffn: int = 48,
    layers: int = 2,
    vocab: int = 97,
    seed: int = 1,
    tie: bool = False,
    biases: bool = False,
    model_type: str = "llama",
    dtype: str = "float32",
) -> Path:
    """Saves a random model and its tokenizer as a Hugging Face folder and returns the folder.

    Logits spread by about 2 and every group matters, unlike with transformers' own small initialisation.
    """
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "bos_token_id": SPECIAL_TOKENS.index("<s>"),
        "eos_token_id": SPECIAL_TOKENS.index("</s>"),
    }
    if model_type == "llama":
        config = LlamaConfig(**sizes, attention_bias=biases, mlp_bias=biases)
    elif model_type == "mistral":
        assert not biases, "Mistral's linears have no bias"
        config = MistralConfig(**sizes, sliding_window=None)
    else:
        raise ValueError(f"no tiny model of type {model_type}")
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random_weight(name, parameter.shape, generator))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(vocab).save_pretrained(folder)
    return folder


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    vocabulary = "embed_tokens" in name or "lm_head" in name
    return noise * (2 if vocabulary else 1) / math.sqrt(shape[1])


def make_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Makes one token per byte: space, newline, printable ASCII, the rest. What has no room is <unk>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c not in "ĠĊ", ord(c)))
    ids = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet][:vocab])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    unk, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unk, bos_token=bos, eos_token=eos
    )


def make_lora(folder: Path, *, r: int, seed: int, size: float = 0.3) -> dict[str, Tensor]:
    """Makes a random fp32 adapter, "layers.{i}.{linear}.lora_A" (r, in), ".lora_B" (out, r). s·B·A is visible."""
    generator = torch.Generator().manual_seed(seed)
    lora = {}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        layers = 1 + max(int(key.split(".")[2]) for key in file.keys() if ".layers." in key)
        for i in range(layers):
            for linear in LINEARS:
                out_features, in_features = file.get_slice(
                    f"model.layers.{i}.{linear}.weight"
                ).get_shape()
                a = torch.randn(r, in_features, generator=generator) / math.sqrt(in_features)
                b = torch.randn(out_features, r, generator=generator) * size / math.sqrt(r)
                lora |= {f"layers.{i}.{linear}.lora_A": a, f"layers.{i}.{linear}.lora_B": b}
    return lora


def make_batches(
    *, steps: int, samples: int, tokens: int, vocab: int, seed: int, masked: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Makes global batches (ids, labels), (samples, tokens). `masked`: prompts of random length are -100."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        input_ids = torch.randint(
            len(SPECIAL_TOKENS), vocab, (samples, tokens), generator=generator
        )
        prompt = torch.randint(0, tokens, (samples, 1), generator=generator)
        hidden = torch.arange(tokens) < prompt
        batches.append(
            (input_ids, input_ids.masked_fill(hidden, -100) if masked else input_ids.clone())
        )
    return batches
