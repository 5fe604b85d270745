"""The versions of other packages that a part of this one needs. pyproject.toml has what all of it needs."""

from importlib.metadata import version
from importlib.util import find_spec

from packaging.version import Version

from loraprune_ds.errors import require

OWN = {"transformers": "5.24", "peft": "0.21.2"}  # runs, chats and evaluations
DEEPSPEED = "0.18.9"
INSTALL = "pip install 'loraprune_ds[deepspeed]'"


def installed(package: str) -> str | None:
    return version(package) if find_spec(package) else None


def is_new(package: str, least: str) -> bool:
    """Tells whether a package is installed, in the version `least` or a newer one."""
    return Version(installed(package) or "0") >= Version(least)


def check_own() -> None:
    for package, least in OWN.items():
        require(
            is_new(package, least),
            f"this command needs {package} {least} or newer; installed is {installed(package)}",
        )


def check_deepspeed(instead: str = "") -> None:
    """Raises UserError without a DeepSpeed that can cut. `instead` is a further way out."""
    require(
        is_new("deepspeed", DEEPSPEED),
        f"this needs DeepSpeed {DEEPSPEED} or newer; installed is {installed('deepspeed')}: {INSTALL}{instead}",
    )
