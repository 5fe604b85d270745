"""The other packages that a part of this one needs. pyproject.toml has what all of it needs."""

import importlib.util
import logging
from importlib.metadata import distributions

from packaging.version import Version

from loraprune_ds.errors import require

log = logging.getLogger(__name__)
# of runs, chats and evaluations, and of ZeRO-3
LEAST = {"transformers": "5.24", "peft": "0.21.2", "deepspeed": "0.18.9"}
ADVICE = {
    "deepspeed": ": pip install 'loraprune_ds[deepspeed]', "
    "or train without ZeRO-3 (a run: --set deepspeed=null)"
}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def installed(package: str) -> str | None:
    return next((found.version for found in distributions(name=package)), None)


def is_new(package: str) -> bool:
    return has(package) and Version(installed(package) or "0") >= Version(LEAST[package])


def check_new(*packages: str) -> None:
    """Raises UserError without one of these packages, or if it is too old."""
    for package in packages:
        require(
            is_new(package),
            f"this needs {package} {LEAST[package]} or newer; "
            f"installed is {installed(package)}{ADVICE.get(package, '')}",
        )


def check_installed(package: str, what: str, install: str | None = None) -> None:
    """Raises UserError without a package. `install` is the name for pip, if that is another."""
    require(
        has(package), f"{what} needs a package that is missing: pip install {install or package}"
    )


def can_show(package: str) -> bool:
    """Tells whether matplotlib or tensorboard is there. Without it, a line says what the result lacks."""
    if not has(package):
        log.warning(
            "the result has no pictures by %s: pip install 'loraprune_ds[pictures]'", package
        )
    return has(package)
