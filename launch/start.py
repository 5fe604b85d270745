"""Starts a command for the scripts in this folder. `loraprune-ds COMMAND` does the same."""

import sys
from importlib import import_module


def start(command: str) -> None:
    """Runs a module of loraprune_ds/cli and exits with its code, or names the module that this Python lacks."""
    try:
        errors = import_module("loraprune_ds.errors")
        module = import_module(f"loraprune_ds.cli.{command}")
    except ModuleNotFoundError as missing:
        sys.exit(
            f"error: {sys.executable} has no {missing.name}; use the .venv that launch/quickstart.sh makes"
        )
    errors.leave_on_error()
    errors.leave(module.main())
