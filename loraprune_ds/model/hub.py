"""Finds the folder of a pretrained model: local, embedded or from the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loraprune_ds.config import ModelConfig
from loraprune_ds.errors import UserError, first_line
from loraprune_ds.model.convert_bin import converted, needs_conversion
from loraprune_ds.model.embedded import embedded_model_dir

EMBEDDED = "embedded"
HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
HUB_BIN_FILES = ["pytorch_model*.bin"]  # only where there are no safetensors
# The bases are errors of the hub's HTTP library. It raises them when a connection is lost midway.
HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)  # type: ignore[assignment]


def locate_model(config: ModelConfig) -> Path:
    """Finds the local folder of `model.path`: a folder, the embedded default, or a hub id, which is downloaded.

    A model in `.bin` files is first converted to safetensors, in the user's cache.

    Raises:
        UserError: it is none of these. The hub cannot be reached. A `.bin` file is missing or damaged.
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
