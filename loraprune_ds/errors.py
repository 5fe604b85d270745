"""The one exception a user should see: a single clear line, no traceback."""


class UserError(Exception):
    """Input that cannot be used. The message names the key, file, layer or rank at fault."""

    exit_code = 2


class RunError(UserError):
    """A run that went wrong in a way its user can act on (a NaN, ranks that disagree)."""

    exit_code = 1


class RankError(RunError):
    """What one rank met alone in the middle of a run, while the others wait for it: it has to tell it itself."""
