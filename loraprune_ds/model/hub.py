"""Finds the folder of a pretrained model: local, embedded or from the hub."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, first_line
from loraprune_ds.model.embedded import embedded_model_dir

EMBEDDED = "embedded"
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "spiece.model", "*.txt", "*.jinja"]
# The bases are errors of the hub's HTTP library, which it raises when a connection breaks.
HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)  # type: ignore[assignment]


def locate_model(config: ModelConfig, key: str = "model.path: ", files: Sequence[str] = HUB_FILES) -> Path:
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
        return Path(snapshot_download(config.path, revision=config.revision, allow_patterns=list(files)))
    except HUB_ERRORS as error:
        reason = first_line(error)
        raise UserError(f"{key}no folder {config.path}, and not available from the hub: {reason}") from None
