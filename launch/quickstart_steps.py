"""Prints the steps of launch/quickstart.sh on this CPU: as the run began, or the number that takes ten minutes.

python launch/quickstart_steps.py runs/quickstart
"""

import sys
import time
from pathlib import Path

from loraprune_ds.train.output import EarlierRun

CHOICES = (50, 30, 20)
LIMIT = 10.0  # minutes
# On two cores of an AMD EPYC with bf16 instructions: minutes of all steps, seconds of the product.
MINUTES, PRODUCT = 6.0, 0.00107
# Fraction of the time that grows with the product. A CPU with AVX2 took 2.3 times as long, its product 5.6 times.
PRODUCTS = 0.3


def product_seconds() -> float:
    """Times a product of 128 tokens with an MLP weight of SmolLM2 on one core, in bf16, as the run computes it."""
    import torch  # takes seconds, which a resumed run does not need

    from loraprune_ds.ranks.device import fast_half_products

    torch.set_num_threads(1)
    tokens, weight = (torch.ones(rows, 576, dtype=torch.bfloat16) for rows in (128, 1536))
    seconds = list[float]()
    with fast_half_products("bfloat16"):
        for _ in range(100):
            began = time.perf_counter()
            torch.nn.functional.linear(tokens, weight)
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def minutes(steps: int, product: float) -> float:
    return MINUTES * steps / CHOICES[0] * (1 - PRODUCTS + PRODUCTS * product / PRODUCT)


def main() -> None:
    if begun := EarlierRun(Path(sys.argv[1])).config:
        print(begun["train"]["steps"])
        return
    product = product_seconds()
    steps = next((n for n in CHOICES if minutes(n, product) <= LIMIT), CHOICES[-1])
    few = "" if steps == CHOICES[0] else f", {steps} steps instead of {CHOICES[0]} on this CPU"
    print(f"expected: {minutes(steps, product):.0f} minutes{few}", file=sys.stderr)
    print(steps)


if __name__ == "__main__":
    main()
