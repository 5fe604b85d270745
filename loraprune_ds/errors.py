"""The exceptions a user should see: a single clear line, no traceback."""


class UserError(Exception):
    """Input that cannot be used. The message names the key, file, layer or rank at fault."""

    exit_code = 2


class RunError(UserError):
    """A run that went wrong in a way its user can act on (a NaN, ranks that disagree)."""

    exit_code = 1


class RankError(RunError):
    """What one rank met alone in the middle of a run, while the others wait for it: it has to tell it itself."""


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks; its type if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Of what an error says; its type if it says nothing. The rest of a hub's or dataset's is advice to programmers."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
