"""Measures how much a text repeats itself."""

from loraprune_ds.generate.models import Ids

GRAM = 4


def repetition(ids: Ids) -> float:
    """Returns the share of 4-grams that occurred before. A text of fewer tokens repeats nothing."""
    grams = [tuple(ids[i : i + GRAM]) for i in range(len(ids) - GRAM + 1)]
    repeated = len(grams) - len(set(grams))
    return repeated / max(1, len(grams))
