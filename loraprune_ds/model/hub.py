"""What can go wrong on the way to the hub."""

from huggingface_hub.errors import HfHubHTTPError, HFValidationError

# A connection that is lost midway raises what the hub's HTTP library has for it, whichever that is.
HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)  # type: ignore[assignment]
