"""Properties that hypothesis tries on drawn cases, the same cases in every run."""

import random
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import randoms

Property = Callable[..., None]
REPEATABLE = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def for_any(examples: int) -> Callable[[Property], Property]:
    """Calls a test with `draw`, whose seed hypothesis chooses."""

    def decorate(test: Property) -> Property:
        drawn = given(draw=randoms(use_true_random=True))(test)
        return settings(REPEATABLE, max_examples=examples)(drawn)

    return decorate


def seed(draw: random.Random) -> int:
    return draw.randrange(1 << 30)
