"""Counts what pruning adds to PEFT on the simulated device, exactly and on any machine.

    python -m tests.benchmarks.launches [--engines one ddp fsdp2 zero3 run]

For each engine and storage of the linears: a step of PEFT alone, what `fisher` and `lora` add to it, a cut, and a cut
with a refit. A row has launches, waits of the host, bytes at the peak, and bytes that move between host and device or
into collectives, on the rank that has most. The model is a Llama of 6 layers and width 128, in fp32, one pass for each
step. Two ranks, but for one process. ZeRO-3 and FSDP2 shard no base of bitsandbytes, so int8 and NF4 are those of our
own trainer on ZeRO-3, `run`. There PEFT alone is a step behind the last cut.

A cut's launches are those of the package's lines. Repeated passes of int8, NF4 and `run` have some, too: products with
weights that are stored so. Result: results/launches.json. tests/support/device.py says what is counted.
"""

import gc
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch.distributed as dist

from loraprune_ds.config_types import Compensation, Criterion, Frozen
from tests.benchmarks.running import RESULTS, add_to, make_parser
from tests.oracle.models import make_tiny_llama
from tests.support import device, plan_cases
from tests.support.counting import (
    SAMPLES,
    TOKENS,
    VOCABULARY,
    Added,
    Case,
    Cost,
    added,
    beside,
    cost_of_cut,
    cost_of_step,
)
from tests.support.device_ranks import start_on_device
from tests.support.ranks import RankPool

STORED: tuple[Frozen | None, ...] = (None, *get_args(Frozen))
# engine -> storages that it takes
TABLE = {"one": STORED, "ddp": STORED, "fsdp2": STORED[:1], "zero3": STORED[:1], "run": STORED}
CRITERIA: tuple[tuple[Criterion, bool], ...] = (
    ("fisher", False),
    ("lora", False),
    ("fisher", True),
)
CUT = 2  # of a run. The last of its steps scores nothing
WIDTH = 14


def rows(pool: RankPool, folder: Path, engine: str, frozen: Frozen | None) -> dict[str, Cost]:
    """Returns what each row of an engine and a storage costs."""
    if engine == "run":
        by_rank = pool.run(2, of_runs, folder, frozen)
    else:
        cases = [Case(engine, criterion, refit, frozen=frozen) for criterion, refit in CRITERIA]
        by_rank = pool.run(1 if engine == "one" else 2, added, *cases)
    fisher, lora, refit = zip(*by_rank, strict=True)
    return {
        "PEFT, a step": most([of.alone for of in fisher]),
        "fisher adds": most([of.step for of in fisher]),
        "lora adds": most([of.step for of in lora]),
        "a cut": most([of.cut for of in fisher]),
        "a cut with a refit": most([of.cut for of in refit]),
    }


def most(ranks: list[Cost]) -> Cost:
    """Returns each number of the rank that has most of it."""
    return Cost(*map(max, zip(*ranks, strict=True)))


def of_runs(folder: Path, frozen: Frozen | None) -> list[Added]:
    """Makes steps of our own trainer with each criterion. Collective."""
    return [_of_run(folder, frozen, criterion, refit) for criterion, refit in CRITERIA]


def _of_run(folder: Path, frozen: Frozen | None, criterion: Criterion, refit: bool) -> Added:
    compensate: Compensation = "least_squares" if refit else "none"
    case = plan_cases.Case(
        folder,
        dtype="float32",
        frozen=frozen,
        window=TOKENS,
        micro_batch_size=SAMPLES,
        compensate=compensate,
        criterion=criterion,
        protected_first=0,
    )
    alone, _ = _step(case, plan_cases.STEPS)
    step, trainer = _step(case, CUT)
    gc.collect()
    alive = device.MEMORY.alive
    with device.counted() as counts:
        trainer.cut(CUT)
    return Added(alone, beside(step, alone), cost_of_cut(counts, alive), 0)


def _step(case: plan_cases.Case, number: int) -> tuple[Cost, Any]:
    """Counts the second step of a fresh trainer as the step of this number. Returns the trainer, too."""
    gc.collect()
    before = device.MEMORY.alive
    trainer = plan_cases.build(case.request(dist.get_world_size()))
    trainer.step(1)
    with device.counted() as counts:
        trainer.step(number)
    return cost_of_step(counts, before), trainer


def show(engine: str, storage: str, found: dict[str, Cost]) -> None:
    for name, cost in found.items():
        numbers = "".join(f"{number:>{WIDTH},}" for number in cost)
        print(f"{engine:<7}{storage:<6}{name:<20}{numbers}", flush=True)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--engines", nargs="+", default=[*TABLE], choices=TABLE)
    engines = parser.parse_args().engines
    if device.MISSING:
        sys.exit(device.MISSING)
    pool = RankPool(start_on_device)
    print(" " * 33 + "".join(f"{name:>{WIDTH}}" for name in Cost._fields))
    case = Case()
    config = asdict(case) | {"samples": SAMPLES, "tokens": TOKENS, "vocabulary": VOCABULARY}
    with tempfile.TemporaryDirectory(prefix="launches-") as name:
        width = case.hidden
        folder = make_tiny_llama(
            Path(name), layers=case.layers, hidden=width, ffn=3 * width, heads=8, kv_heads=4,
            head_dim=width // 8, vocab=VOCABULARY,
        )  # fmt: skip
        for engine in engines:
            for frozen in TABLE[engine]:
                storage = frozen or "fp32"
                found = rows(pool, folder, engine, frozen)
                show(engine, storage, found)
                result: dict[str, Any] = {row: cost._asdict() for row, cost in found.items()}
                result["config"] = config | {"engine": engine, "frozen": frozen}
                add_to(RESULTS / "launches.json", f"{engine}, {storage}", result)
    pool.close()


if __name__ == "__main__":
    main()
