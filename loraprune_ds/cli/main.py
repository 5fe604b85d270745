"""`loraprune-ds COMMAND`: the scripts of launch/ where only the package is installed."""

import importlib
import sys
from typing import NoReturn

from loraprune_ds.command import leave, leave_on_error, tell
from loraprune_ds.errors import UserError

# By name: the module whose `main` it is, and what it does.
COMMANDS = {
    "run": ("launcher", "prune a model while it is tuned"),
    "plan": ("plan", "say what a run needs, before it runs"),
    "evaluate": ("evaluate", "measure a model, alone or beside a dense one"),
    "export": ("export", "convert a result for the tool that will read it"),
    "compare": ("compare", "put results side by side"),
}


def main() -> NoReturn:
    """Carries out the command and ends with its exit code."""
    leave_on_error()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("loraprune-ds COMMAND ...      (loraprune-ds COMMAND --help tells more)\n")
        print("\n".join(f"  {command:10}{about}" for command, (_, about) in COMMANDS.items()))
        leave(0)
    if name not in COMMANDS:
        tell(UserError(f"there is no command {name}; there are {', '.join(COMMANDS)}"))
        leave(UserError.exit_code)
    sys.argv = [f"loraprune-ds {name}", *arguments]
    leave(importlib.import_module(f"loraprune_ds.cli.{COMMANDS[name][0]}").main())
