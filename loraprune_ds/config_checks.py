"""Checks of a config section's values; every message names the key. None stands for a default and passes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from loraprune_ds.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raises UserError with `message` unless `ok`."""
    if not ok:
        raise UserError(message)


class Checks:
    """Of the values of one section, by key. Every method raises a UserError for the first key that does not pass."""

    def __init__(self, section: str, values: Any) -> None:
        self._section = section
        self._values = values

    def one_of(self, key: str, allowed: Sequence[str]) -> None:
        """One of some words."""
        for name, value in self._given([key]):
            require(value in allowed, f"{name} must be one of {', '.join(allowed)}; got {value!r}")

    def at_least(self, least: int, *keys: str) -> None:
        """`least` itself passes."""
        for name, value in self._given(keys):
            require(value >= least, f"{name} must be at least {least}; got {value}")

    def positive(self, *keys: str) -> None:
        """Above zero."""
        for name, value in self._given(keys):
            require(value > 0, f"{name} must be positive; got {value}")

    def within(self, interval: str, *keys: str) -> None:
        """`interval`: two numbers in brackets, such as `[0, 1)`; a round one leaves its end out."""
        low, high = (float(end) for end in interval[1:-1].split(","))
        for name, value in self._given(keys):
            above = low <= value if interval[0] == "[" else low < value
            below = value <= high if interval[-1] == "]" else value < high
            require(above and below, f"{name} must be in {interval}; got {value}")

    def has_effect(self, needed: str, *keys: str, given: bool) -> None:
        """A setting that nothing would read was meant for something: another setting was forgotten."""
        defaults = {field.name: field.default for field in dataclasses.fields(self._values)}
        for key in keys:
            unset = getattr(self._values, key) == defaults[key]
            require(given or unset, f"{self._at(key)} has no effect without {needed}")

    def _given(self, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Dotted name and value of those that are not None."""
        return ((self._at(key), value) for key in keys if (value := getattr(self._values, key)) is not None)

    def _at(self, key: str) -> str:
        return f"{self._section}.{key}"
