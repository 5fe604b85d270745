"""Holds the exceptions that a user should see: a single clear line, no traceback."""


class UserError(Exception):
    """Input that cannot be used. The message names the key, file, layer or rank at fault."""

    exit_code = 2


class RunError(UserError):
    """A run that went wrong in a way its user can act on (a NaN, ranks that disagree)."""

    exit_code = 1


class RankError(RunError):
    """An error that one rank met alone in the middle of a run. The others wait for it, so it must tell this itself."""


def require(ok: bool, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


def one_line(error: BaseException) -> str:
    """Returns the message of an error without line breaks. An error without a message gives its type."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none.

    The rest of a message from the hub or from `datasets` is advice to programmers.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
