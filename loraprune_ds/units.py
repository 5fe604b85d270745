"""Writes numbers and tables for people."""

import math
from collections.abc import Callable, Iterator, Sequence


def or_dash(value: float | None, write: Callable[[float], str]) -> str:
    """Writes a value, or '-' if there is none."""
    return "-" if value is None else write(value)


def format_count(count: float) -> str:
    """Writes 134515008 as '134.5 M'."""
    return _scaled(count, ("", " k", " M", " B", " T"))


def format_bytes(count: float) -> str:
    """Writes 134515008 as '134.5 MB', in decimal units."""
    return _scaled(count, (" B", " kB", " MB", " GB", " TB", " PB"))


def format_change(before: float, after: float) -> str:
    """Writes a change from 4 to 3 as '25.0 % less'."""
    percent = format_percent(abs(after / before - 1))
    if percent == format_percent(0):
        return "unchanged"
    return f"{percent} {'less' if after < before else 'more'}"


def format_percent(fraction: float) -> str:
    """Writes 0.2475 as '24.8 %'."""
    return f"{100 * fraction:.1f} %"


def format_perplexity(perplexity: float | None, digits: int = 2) -> str:
    """Writes 12.3456 as '12.35', or the huge value of a broken model as '1.23e+07'."""
    if perplexity is None:
        return "-"
    if not math.isfinite(perplexity):
        return "not finite"
    return f"{perplexity:.{digits}f}" if perplexity < 1e5 else f"{perplexity:.2e}"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """Yields the rows of a table as lines. `sides` has one sign per column: "<" is flush left, ">" flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        columns = zip(row, sides, widths, strict=True)
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in columns).rstrip()


def _scaled(value: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < 999.95:
            return f"{value:.0f}{unit}" if unit == units[0] else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}{units[-1]}"
