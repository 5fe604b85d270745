"""Compares the plan with measured ranks of SmolLM2-135M and of a random LLaMA of 1.1 billion parameters.

    python -m tests.benchmarks.plan_measured [--models smollm2 1b 1b-nf4 ...] [--ranks 1 2 3]

Each launch trains two steps, cuts to 40 %, then trains two more, in bf16 on CPU ranks. Storages are compared to the
byte. The largest peaks before the cut, in it and after it are compared with the plan, in RssAnon + RssShmem above what
a process held after all imports and a tiny training. What it holds beside its state when a step begins is added to the
plan.

Blocks from 128 KiB are given back when freed, so resident memory shows the live tensors. The result goes to
results/plan_measured.json. The run ends with an error if a planned number is off.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.multiprocessing.spawn import spawn

from loraprune_ds.config_types import Compensation
from loraprune_ds.files import read_json, write_json
from loraprune_ds.plan.request import Request
from loraprune_ds.plan.stages import plan_stages, training_stage
from loraprune_ds.pretrained.sources import embedded_model_dir
from tests.benchmarks.running import RESULTS, ROOT, add_to, make_parser
from tests.benchmarks.wide_layers import FROZEN, write_random_weights
from tests.oracle.models import make_tiny_llama
from tests.support.plan_cases import Case, planned_peak, run_beside_plan
from tests.support.published import sizes_of
from tests.support.ranks import start_deepspeed

RESULT = RESULTS / "plan_measured.json"
LOWEST, HIGHEST = 0.97, 1.15  # planned peaks, of the largest measured one
DEPTHS = {"smollm2": 30, "smollm2-refit": 30, "1b": 22, "1b-refit": 22, "1b-int8": 22, "1b-nf4": 22}
LIMITED = {"stage3_max_live_parameters": 200_000_000, "stage3_max_reuse_distance": 100_000_000}


def save_1b_config(folder: Path) -> None:
    """Saves TinyLlama's sizes."""
    others = {
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32_000,
        "architectures": ["LlamaForCausalLM"],
    }
    write_json(folder / "config.json", sizes_of("llama", 2048, 5632, DEPTHS["1b"], 32, **others))


def cases(model: str, folder: Path) -> Case:
    """Returns SmolLM2 with the shipped DeepSpeed config. The large one has checkpointing, gathers little.

    With `refit` a cut repeats passes. `1b-int8` and `1b-nf4` have `model.frozen`, a refit and a teacher.
    """
    name, _, variant = model.partition("-")
    compensate: Compensation = "least_squares" if variant else "none"
    if name == "smollm2":
        # two steps with ten tokens for each input of its widest linear
        longer = {"window": 512, "micro_batch_size": 2, "micro_batches": 8} if variant else {}
        return replace(Case(embedded_model_dir(), window=64, compensate=compensate), **longer)
    limited = read_json(ROOT / "ds_configs" / "zero3.json")
    limited["zero_optimization"] |= LIMITED
    write_json(folder / "limited.json", limited)
    return Case(
        folder / "1b",
        deepspeed=str(folder / "limited.json"),
        window=32,
        checkpointing=True,
        compensate=compensate,
        frozen=FROZEN.get(variant),
        distilled=variant in FROZEN,
    )


def rank_main(rank: int, world_size: int, case: Case, folder: Path) -> None:
    start_deepspeed(rank, world_size, folder)
    run_beside_plan(replace(case, folder=folder / "tiny"))  # makes the late imports
    write_json(folder / f"rank-{rank}.json", run_beside_plan(case))


def peaks(request: Request, ranks: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns (planned, measured) bytes of the largest peak before and after the cut, over all ranks and steps."""
    found = {}
    sides = {
        "before": (request.shape, True),
        "after": (request.shape_at(request.schedule.steps), False),
    }
    for (when, (shape, scores)), numbers in zip(sides.items(), ((0, 1), (2, 3)), strict=True):
        planned, resident = (
            planned_peak(request, shape, scores=scores),
            training_stage("", request, shape).resident,
        )
        both = [
            (planned + beside(rank, n, resident), rank["steps"][n]["peak_rss"])
            for rank in ranks
            for n in numbers
        ]
        found[when] = max(p for p, _ in both), max(m for _, m in both)
    if request.refits:
        found["in"] = cut_peaks(request, ranks)
    return found


def cut_peaks(request: Request, ranks: list[dict[str, Any]]) -> tuple[int, int]:
    """Returns (planned, measured) bytes of the peak of the cut, over all ranks."""
    after = request.shape_at(request.schedule.steps)
    cut = plan_stages(request, after, after)[1]
    beside_state = max(int(rank["steps"][1]["rss"]) for rank in ranks) - cut.resident
    return cut.peak + beside_state, max(rank["states"][1]["peak_rss"] for rank in ranks)


def beside(rank: dict[str, Any], step: int, resident: int) -> int:
    """Returns the bytes that a process held in addition to its state when a step began."""
    if step % 2:
        return int(rank["steps"][step - 1]["rss"]) - resident
    state = rank["states"][step // 2]  # loaded, or after the cut
    return int(state["rss"] - state["planned_storages"])


def measure(model: str, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Returns what every rank found, in rank order. The processes are fresh, and have time for a busy machine."""
    (folder / "store").unlink(missing_ok=True)
    spawn(rank_main, (world_size, cases(model, folder), folder), nprocs=world_size)
    return [read_json(folder / f"rank-{rank}.json") for rank in range(world_size)]


def faults(name: str, request: Request, ranks: list[dict[str, Any]]) -> list[str]:
    """Lists the numbers that are not as planned."""
    found = [
        f"{name}, rank {row['rank']}, {state['at']}: storages {state['storages']}, planned {state['planned_storages']}"
        for row in ranks
        for state in row["states"]
        if state["storages"] != state["planned_storages"]
    ]
    return found + [
        f"{name}, {when} the cut: {measured / 1e6:.0f} MB resident, planned {planned / 1e6:.0f}"
        for when, (planned, measured) in peaks(request, ranks).items()
        if not LOWEST <= planned / measured <= HIGHEST
    ]


def keep(name: str, request: Request, rows: list[dict[str, Any]]) -> None:
    """Shows one launch and adds it to the result file."""
    for when, (planned, measured) in peaks(request, rows).items():
        sizes = f"planned {planned / 1e6:>9.1f} MB  measured {measured / 1e6:>9.1f} MB"
        print(f"{name}, {when} the cut: {sizes}  {planned / measured:.3f}")
    add_to(RESULT, name, {"ranks": rows, "faults": faults(name, request, rows), "limited": LIMITED})


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=[*DEPTHS], choices=DEPTHS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)  # the ranks inherit it
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="plan-measured-") as name:
        folder = Path(name)
        if any(model.startswith("1b") for model in arguments.models):
            save_1b_config(folder / "1b")
            write_random_weights(folder / "1b")
        for model in arguments.models:
            make_tiny_llama(folder / "tiny", layers=DEPTHS[model], hidden=64, dtype="bfloat16")
            for world_size in arguments.ranks:
                rows, request = (
                    measure(model, world_size, folder),
                    cases(model, folder).request(world_size),
                )
                name = f"{model}, {world_size} ranks"
                found += faults(name, request, rows)
                keep(name, request, rows)
    if found:
        sys.exit(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
