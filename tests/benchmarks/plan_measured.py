"""Compares the plan with measured ranks. SmolLM2-135M and a random LLaMA of 1.1 billion parameters run on 1, 2, 3
ranks.

    python -m tests.benchmarks.plan_measured [--models smollm2 1b] [--ranks 1 2 3]

Each launch trains two steps, cuts to 40 %, then trains two more. It has one micro-batch per rank and step, in bf16
on CPU ranks. Storages and bytes sent are compared to the byte. Bytes that DeepSpeed gathers and reduces are counted
below its own front. Bytes that pruning sends come from its counter.

Memory is RssAnon + RssShmem, sampled every 5 ms. The baseline is taken off: what the process held after all imports
and the training of a tiny model. `objects` are the part of it that is no tensor: Python's objects for modules, hooks
and traces. They depend on the depth, not on the widths, and take tens of MB. The same process measures them first,
on a model as deep with tiny widths. Then they are taken off, too.

Blocks from 128 KiB are given back to the system when freed, so resident memory shows what is held. glibc would keep
more, the longer it runs. The result goes to tests/benchmarks/results/plan_measured.json. The run ends with an error
if a planned number is off.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig

from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.weight_files import weight_file_count, write_index, write_weight_file
from loraprune_ds.report.provenance import hardware, versions
from tests.oracle.models import make_tiny_llama
from tests.plan_cases import Case, run_beside_plan
from tests.ranks import start_deepspeed

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "plan_measured.json"
RSS_TOLERANCE = 0.10  # of what is planned, for the 1B model
DEPTHS = {"smollm2": 30, "1b": 22}
TINY = {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32, "ffn": 48, "vocab": 97, "seed": 0}
LIMITED = {"stage3_max_live_parameters": 200_000_000, "stage3_max_reuse_distance": 100_000_000}


def make_random_1b(folder: Path, vocab_size: int = 32_000) -> Path:
    """TinyLlama's sizes, written layer by layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=DEPTHS["1b"],
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = shape_from_config(config.to_dict(), str(folder)).parameters()
    layers = config.num_hidden_layers
    count = weight_file_count(layers)
    generator = torch.Generator().manual_seed(0)
    entries = []
    for k in range(count):
        names = [n for n in shapes if (f".layers.{k}." in n if k < layers else ".layers." not in n)]
        tensors = {n: _random(n, shapes[n], generator) for n in names}
        entries.append(write_weight_file(folder, k, count, tensors))
    write_index(folder, entries)
    return folder


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Repeats one row of noise. Memory and traffic do not depend on the values of the weights."""
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    row = torch.randn(shape[-1], generator=generator) * 0.02
    return row.to(torch.bfloat16).expand(shape).contiguous()


def cases(model: str, folder: Path) -> Case:
    """Returns SmolLM2 with the shipped DeepSpeed config. The large one has checkpointing, gathers little at once."""
    if model == "smollm2":
        return Case(embedded_model_dir(), window=64)
    limited = read_json(ROOT / "ds_configs" / "zero3.json")
    limited["zero_optimization"] |= LIMITED
    write_json(folder / "limited.json", limited)
    return Case(folder / "1b", deepspeed=str(folder / "limited.json"), window=32, checkpointing=True)


def rank_main(rank: int, world_size: int, case: Case, folder: Path) -> None:
    start_deepspeed(rank, world_size, folder)
    tiny = replace(case, folder=folder / "tiny")
    run_beside_plan(tiny)  # imports what is imported late
    objects = objects_of(run_beside_plan(tiny))
    write_json(folder / f"rank-{rank}.json", run_beside_plan(case) | {"objects": objects})


def objects_of(tiny: dict[str, Any]) -> dict[str, int]:
    """Measures the bytes that are no tensors, by moment. The tensors of the measured model are negligible."""
    of_states = {state["at"]: state["rss"] - state["planned_storages"] for state in tiny["states"]}
    return of_states | {peak_of(s["step"]): s["rss"] - s["resident_planned"] for s in tiny["steps"]}


def peak_of(step: int) -> str:
    return f"peak of step {step}"


def measure(model: str, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Returns what every rank found, in rank order. The processes are fresh, and have time for a busy machine."""
    (folder / "store").unlink(missing_ok=True)
    spawn(rank_main, (world_size, cases(model, folder), folder), nprocs=world_size)
    return [read_json(folder / f"rank-{rank}.json") for rank in range(world_size)]


def faults(model: str, ranks: list[dict[str, Any]]) -> list[str]:
    """Lists the numbers that are not as planned."""
    found = []
    for row in ranks:
        where = f"{model} on {len(ranks)} ranks, rank {row['rank']}"
        for state in row["states"]:
            if state["storages"] != state["planned_storages"]:
                found.append(
                    f"{where}, {state['at']}: storages {state['storages']}, planned {state['planned_storages']}"
                )
            sent = state.get("sent")
            if sent and sent["planned"] != sent["counted"]:
                found.append(f"{where}, cut: sent {sent}")
        for step in row["steps"]:
            found += [
                f"{where}, step {step['step']}: {kind} {step[kind]}"
                for kind in ("weights", "lora_gradients", "pruning")
                if step[kind]["planned"] != step[kind]["counted"]
            ]
        if model == "1b":
            found += [
                f"{where}, {name}: {measured / 1e6:.0f} MB resident, planned {planned / 1e6:.0f}"
                for name, planned, measured in rss_pairs(row)
                if abs(measured / planned - 1) > RSS_TOLERANCE
            ]
    return found


def rss_pairs(row: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Returns (when, planned, measured) bytes of resident memory above the baseline, objects taken off."""
    loaded, cut = row["states"]
    pairs = [("loaded", loaded["planned_storages"], loaded["rss"])]
    pairs += [(peak_of(s["step"]), s["peak_planned"], s["peak_rss"]) for s in row["steps"]]
    pairs += [("after the cut", cut["planned_storages"], cut["rss"])]
    return [(when, planned, measured - row["objects"][when]) for when, planned, measured in pairs]


def show(model: str, ranks: list[dict[str, Any]]) -> None:
    row = ranks[0]
    print(f"{model}, {len(ranks)} ranks, rank 0")
    for name, planned, measured in rss_pairs(row):
        sizes = f"planned {planned / 1e6:>9.1f} MB  resident {measured / 1e6:>9.1f} MB"
        print(f"  {name:<16}{sizes}  {measured / planned:.3f}  objects {row['objects'][name] / 1e6:.0f} MB apart")
    weights, cut = row["steps"][1]["weights"]["counted"], row["states"][1]["sent"]["counted"]
    print(f"  a step sends {weights / 1e6:.1f} MB of weights; a cut {cut / 1e6:.1f} MB")


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Puts one launch into the result file, beside those of other calls."""
    result = read_json(RESULT) if RESULT.exists() else {}
    facts = {"versions": versions(), "hardware": hardware("cpu"), "limited": LIMITED, "rss_tolerance": RSS_TOLERANCE}
    result[name] = {"ranks": rows, "faults": faults(name.split(",")[0], rows), **facts}
    write_json(RESULT, dict(sorted(result.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "1b"], choices=("smollm2", "1b"))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 3])
    arguments = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 17)  # the ranks inherit it
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="plan-measured-") as name:
        folder = Path(name)
        if "1b" in arguments.models:
            make_random_1b(folder / "1b")
        for model in arguments.models:
            make_tiny_llama(folder / "tiny", layers=DEPTHS[model], dtype="bfloat16", **TINY)  # type: ignore[arg-type]
            for world_size in arguments.ranks:
                rows = measure(model, world_size, folder)
                found += faults(model, rows)
                show(model, rows)
                keep(f"{model}, {world_size} ranks", rows)
    if found:
        sys.exit(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
