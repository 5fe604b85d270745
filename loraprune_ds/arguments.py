"""`loraprune-ds COMMAND`, and the argument parser of all commands."""

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from loraprune_ds.errors import UserError, leave, leave_on_error, require, run_command
from loraprune_ds.removed import OPTIONS

COMMANDS = {  # the modules of loraprune_ds/cli
    "run": "prune a model while it is tuned",
    "plan": "estimate what a run needs",
    "chats": "let a model write the chats that its pruned copy is tuned on",
    "evaluate": "measure a model, alone or next to the dense one",
    "export": "convert a result to the format of another tool",
    "compare": "compare results",
}


def main() -> NoReturn:
    """Runs `loraprune-ds COMMAND` and exits with its code."""
    leave_on_error()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {command:10}{about}" for command, about in COMMANDS.items())
        usage = "loraprune-ds COMMAND ...      (for details: loraprune-ds COMMAND --help)"
        sys.stdout.write(f"{usage}\n\n{commands}\n")
        leave(0)
    leave(run_command(lambda: _start(name, arguments)))


def _start(name: str, arguments: list[str]) -> int:
    require(name in COMMANDS, f"there is no command {name}; there are {', '.join(COMMANDS)}")
    sys.argv = [f"loraprune-ds {name}", *arguments]
    module = importlib.import_module(f"loraprune_ds.cli.{name}")
    return module.launch() if name == "run" else module.main()


class Parser(argparse.ArgumentParser):
    """A parser that reports wrong arguments like other wrong input. Its help shows the command as typed."""

    def __init__(self, description: str | None, **options: Any) -> None:
        super().__init__(
            sys.argv[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized"):  # another command may have an option of that name
            for word in message.split():
                require(word not in OPTIONS, f"{word} was removed: {OPTIONS.get(word)}")
        raise UserError(message)


def at_least(least: int) -> Callable[[str], int]:
    """Returns a type of options: whole numbers from `least` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {text}")
        return value

    return number


def require_option(arguments: argparse.Namespace, needed: str, *options: str) -> None:
    """Raises UserError if one of the `options` is given without the `needed` one, which alone reads them."""
    for option in options:
        value = getattr(arguments, option, None)
        is_set = value or type(value) is int  # 0 is a value, False is not
        require(
            bool(getattr(arguments, needed)) or not is_set,
            f"{_flag(option)} has no effect without {_flag(needed)}",
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
