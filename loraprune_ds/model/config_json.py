"""Finds the config.json of a model by name, without its weights."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from loraprune_ds.errors import UserError, first_line
from loraprune_ds.files import read_json
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.hub import EMBEDDED, HUB_ERRORS
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape

# LLaMA (arXiv 2302.13971, table 2). Heads have 128 dimensions, and there are 32,000 tokens.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LLAMA = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-30b": (6656, 60, 52, 17920),
    "llama-65b": (8192, 80, 64, 22016),
}


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """Reads config.json alone. No weight is read or downloaded.

    Args:
        model: a folder, a hub id, or a name of LLAMA.

    Raises:
        UserError: the model is not found here or on the hub.
    """
    if model in LLAMA:
        return {"model_type": "llama", "vocab_size": 32_000} | dict(zip(SIZES, LLAMA[model], strict=True))
    folder = embedded_model_dir() if model == EMBEDDED else Path(model).expanduser()
    if folder.is_dir():
        return read_json(folder / "config.json")
    known = f"a folder, a hub id, or one of {', '.join(LLAMA)}"
    if model.startswith((".", "~", "/")) or model.count("/") != 1:
        raise UserError(f"model {model} does not exist; give {known}")
    try:
        return read_json(Path(hf_hub_download(model, "config.json", revision=revision)))
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise UserError(f"model {model} is no folder and not available from the hub ({reason}); give {known}") from None


def read_shape(model: str) -> ModelShape:
    """Reads the sizes of a model."""
    return shape_from_config(read_config(model), model)
