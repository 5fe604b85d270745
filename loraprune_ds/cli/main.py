"""`loraprune-ds COMMAND`: the scripts of launch/ where only the package is installed."""

import importlib
import sys
from typing import NoReturn

from loraprune_ds.command import leave, leave_on_error, tell
from loraprune_ds.errors import UserError

COMMANDS = {
    "run": "prune a model while it is tuned",
    "plan": "estimate what a run needs",
    "evaluate": "measure a model, alone or next to the dense one",
    "export": "convert a result for the tool that will read it",
    "compare": "compare results",
}


def main() -> NoReturn:
    """Runs the command and exits with its code."""
    leave_on_error()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("loraprune-ds COMMAND ...      (loraprune-ds COMMAND --help tells more)\n")
        print("\n".join(f"  {command:10}{about}" for command, about in COMMANDS.items()))
        leave(0)
    if name not in COMMANDS:
        tell(UserError(f"there is no command {name}; there are {', '.join(COMMANDS)}"))
        leave(UserError.exit_code)
    sys.argv = [f"loraprune-ds {name}", *arguments]
    module = importlib.import_module(f"loraprune_ds.cli.{name}")
    leave(module.launch() if name == "run" else module.main())
