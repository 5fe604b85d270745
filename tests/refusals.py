"""What a user reads when something is refused."""

from collections.abc import Callable
from typing import Any

import pytest

from loraprune_ds.errors import UserError


def refused(act: Callable[..., object], *given: Any, **settings: Any) -> str:
    """Returns the one line of the UserError."""
    with pytest.raises(UserError) as caught:
        act(*given, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message
