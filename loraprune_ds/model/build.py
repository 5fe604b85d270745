"""Where a model comes from, and its modules without any weights."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, first_line, one_line
from loraprune_ds.model.convert_bin import converted, needs_conversion
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.families import CAUSAL_LMS, config_class
from loraprune_ds.model.hub import HUB_ERRORS
from loraprune_ds.model.pretrained import PretrainedModel
from loraprune_ds.model.token_loss import with_token_losses

HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
HUB_BIN_FILES = ["pytorch_model*.bin"]  # only where there are no safetensors
EMBEDDED = "embedded"


def locate_model(config: ModelConfig) -> Path:
    """The local folder of `model.path`: a folder, the embedded default, or a hub id, which is downloaded.

    A `.bin` checkpoint is converted to safetensors first, which are in the user's cache.

    Raises:
        UserError: it is none of these, the hub cannot be reached, or a `.bin` file is missing or damaged.
    """
    if config.path == EMBEDDED:
        return embedded_model_dir()
    folder = Path(config.path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or config.path.startswith((".", "~")) or config.path.count("/") > 1:
            raise UserError(f"model.path: folder {config.path} does not exist")
        folder = _download(config)
    return converted(folder) if needs_conversion(folder) else folder


def _download(config: ModelConfig) -> Path:
    try:
        folder = Path(snapshot_download(config.path, revision=config.revision, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(config.path, revision=config.revision, allow_patterns=HUB_BIN_FILES)
        return folder
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise UserError(f"model.path: no folder {config.path}, and not available from the hub: {reason}") from None


def build_on_meta(
    pretrained: PretrainedModel, attn_implementation: str, loss_chunk_tokens: int | None = None
) -> PreTrainedModel:
    """The modules of the checkpoint's model, every parameter on the meta device: shapes only, no memory.

    Buffers that a checkpoint does not hold (rotary frequencies) are real. Told the labels, the model gives token losses
    (token_loss.py), `loss_chunk_tokens` at a time.
    """
    model_class = CAUSAL_LMS[pretrained.shape.model_type]
    config = config_class(pretrained.shape.model_type).from_dict(dict(pretrained.config))  # may differ from the file's
    config.use_cache = False
    config._attn_implementation = attn_implementation
    with torch.device("meta"):
        model = model_class(config)
    decoder = model.get_submodule("model")
    rotary = decoder.get_submodule("rotary_emb")
    decoder.rotary_emb = type(rotary)(config=config)
    return with_token_losses(model, loss_chunk_tokens)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM, wrapped by PEFT or not."""
    for path in ("base_model.model.model.layers", "model.layers"):
        try:
            layers = model.get_submodule(path)
        except AttributeError:
            continue
        assert isinstance(layers, nn.ModuleList)
        return layers
    raise AssertionError(f"{type(model).__name__} has no decoder layers")


def check_buildable(pretrained: PretrainedModel, attn_implementation: str) -> None:
    """Whether transformers can make the checkpoint's model here, found out without any weights.

    Raises:
        UserError: it refuses something in config.json, or this attention implementation.
    """
    try:
        build_on_meta(pretrained, attn_implementation)
    except Exception as error:  # config.json may hold anything, and transformers raises what comes of it
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{pretrained.folder}: transformers cannot build this model (config.json, or model.attn_implementation "
            f"{attn_implementation}): {reason}"
        ) from error
