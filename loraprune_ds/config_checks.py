"""Checks of a config section's values; every message names the key. None stands for a default and passes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from loraprune_ds.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


class Checks:
    """Of the values of one section, by key."""

    def __init__(self, section: str, values: Any) -> None:
        self._section = section
        self._values = values

    def one_of(self, key: str, allowed: Sequence[str]) -> None:
        value = getattr(self._values, key)
        require(
            value is None or value in allowed, f"{self._at(key)} must be one of {', '.join(allowed)}; got {value!r}"
        )

    def at_least(self, least: int, *keys: str) -> None:
        for key in keys:
            value = getattr(self._values, key)
            require(value is None or value >= least, f"{self._at(key)} must be at least {least}; got {value}")

    def positive(self, *keys: str) -> None:
        for key in keys:
            value = getattr(self._values, key)
            require(value is None or value > 0, f"{self._at(key)} must be positive; got {value}")

    def within(self, interval: str, *keys: str) -> None:
        """`interval`: two numbers in brackets, such as `[0, 1)`; a round one leaves its end out."""
        low, high = (float(end) for end in interval[1:-1].split(","))
        for key in keys:
            value = getattr(self._values, key)
            above = value is None or (low <= value if interval[0] == "[" else low < value)
            below = value is None or (value <= high if interval[-1] == "]" else value < high)
            require(above and below, f"{self._at(key)} must be in {interval}; got {value}")

    def has_effect(self, needed: str, *keys: str, given: bool) -> None:
        """A setting that nothing would read was meant for something: another setting was forgotten."""
        defaults = {field.name: field.default for field in dataclasses.fields(self._values)}
        for key in keys:
            unset = getattr(self._values, key) == defaults[key]
            require(given or unset, f"{self._at(key)} has no effect without {needed}")

    def _at(self, key: str) -> str:
        return f"{self._section}.{key}"
