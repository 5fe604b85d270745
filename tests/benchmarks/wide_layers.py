"""Runs two layers of LLaMA-65B and 70B widths on two CPU ranks, under an enforced limit of host memory.

    python -m tests.benchmarks.wide_layers [--models 65b 65b-int8 65b-nf4 65b-refit 70b]

The weights are random, in bf16, with vocabulary 512. Two ranks (`wide_layers_rank.py`) load them, train with LoRA, cut
25 % and then 50 % of the linear parameters, save a checkpoint, export, and read the export back.

Meanwhile this process reads RssAnon + RssShmem of every rank from /proc, and kills them all when one holds more above
its imports than its shard, one decoder layer and SLACK. (RLIMIT_AS and RLIMIT_DATA would charge mapped files too.) In
the negative control one rank materialises the full weights. It must be killed.

A name may end with `model.frozen`, int8 or nf4, or with `refit`: the cuts refit, and have the plan's limit. `tiny`,
`tiny-nf4` and so on try the script. Result: results/wide_layers.json.
"""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.config import RunConfig
from loraprune_ds.config_types import Frozen
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.groups import Kind
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.request import Request, build_request
from loraprune_ds.plan.stages import Stage, plan_stages, split_state
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.weight_files import write_weight_file
from tests.benchmarks.memory import Watched, told, watch
from tests.benchmarks.running import RESULTS, ROOT, add_to, cpu_environment, make_parser
from tests.benchmarks.wide_layers_rank import CUTS, STEPS, WINDOW, make_config
from tests.support.launching import on_ranks
from tests.support.plan_cases import planned_peak
from tests.support.plan_requests import changed
from tests.support.published import sizes_of

RESULT = RESULTS / "wide_layers.json"
RANKS, LAYERS, VOCABULARY = 2, 2, 512
WIDE = 8192
# hidden size, channels, heads, key-value heads
SIZES = {"65b": (WIDE, 22016, 64, 64), "70b": (WIDE, 28672, 64, 8), "tiny": (256, 704, 8, 4)}
FROZEN: dict[str, Frozen] = {"int8": "int8", "nf4": "nf4"}
VARIANTS = ("", "-int8", "-nf4", "-refit")
NAMES = [size + variant for size in SIZES for variant in VARIANTS]
PUBLISHED = ("65b", "65b-int8", "65b-nf4", "65b-refit", "70b")
# bytes: linears fetched ahead of the layer in use, activations, what gloo and the allocator keep
SLACK = 700_000_000


def config_json(name: str) -> dict[str, Any]:
    hidden, channels, heads, kv_heads = SIZES[name.partition("-")[0]]
    sizes = sizes_of(
        "llama",
        hidden,
        channels,
        LAYERS,
        heads,
        num_key_value_heads=kv_heads,
        vocab_size=VOCABULARY,
    )
    return sizes | {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "dtype": "bfloat16",
    }


def write_random_weights(folder: Path) -> None:
    """Writes one file per tensor. Random numbers are drawn once and repeated. No row divides the period."""
    period = (
        torch.randn((1 << 24) - 3, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    )
    shapes = shape_from_config(read_json(folder / "config.json"), str(folder)).parameters()
    for i, (tensor_name, shape) in enumerate(shapes.items()):
        numel = torch.Size(shape).numel()
        tensor = period.roll(7919 * i).repeat(-(-numel // len(period)))[:numel].view(shape)
        tensor = torch.ones(shape, dtype=torch.bfloat16) if "norm" in tensor_name else tensor
        write_weight_file(folder / f"{i:05d}.safetensors", {tensor_name: tensor})


def write_ds_config(path: Path, shape: ModelShape) -> None:
    """Writes the shipped config, but at most two gathered linears stay alive, as on a tight machine."""
    largest_linear = max(torch.Size(size).numel() for size in shape.parameters().values())
    config = read_json(ROOT / "ds_configs" / "zero3.json")
    config["zero_optimization"] |= {
        "stage3_max_live_parameters": 2 * largest_linear,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": largest_linear,
    }
    write_json(path, config)


def config_of(name: str, folder: Path) -> RunConfig:
    _, _, variant = name.partition("-")
    return make_config(folder, RANKS, FROZEN.get(variant), refit=variant == "refit")


def run_ranks(folder: Path, limit: int, *options: str) -> Watched:
    command = [*on_ranks(RANKS), "tests/benchmarks/wide_layers_rank.py", "--folder", str(folder)]
    command += options
    output = folder / "output.txt"
    # freed blocks are given back, as in `plan_measured`
    environment = cpu_environment(MALLOC_MMAP_THRESHOLD_=str(1 << 17))
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        watched = watch(process, folder, limit)
    if watched.exit_code and watched.killed is None:
        sys.stderr.write(output.read_text()[-4000:])
    return watched


def measure(name: str, folder: Path) -> dict[str, Any]:
    """The run itself, on the checkpoint in `folder`."""
    shape = shape_from_config(config_json(name), name)
    write_ds_config(folder / "ds.json", shape)
    request = request_for(name, folder, shape)
    shard = request.shard_bytes(request.stored(shape))
    layer = 2 * shape.layers[0].numel
    limit = shard + layer + SLACK
    options: list[str] = []
    if request.config.model.frozen:
        options += ["--frozen", request.config.model.frozen]
    if request.refits:
        options.append("--refit")
        limit = SLACK + planned_cut(request).peak
    watched = run_ranks(folder, limit, *options)
    assert (watched.killed, watched.exit_code) == (None, 0), watched
    ranks = [read_json(folder / f"result-{rank}.json") for rank in range(RANKS)]
    result = {
        "parameters": shape.total_numel(),
        "bytes": {"whole_model": 2 * shape.total_numel(), "shard": shard, "whole_layer": layer},
        "imports": [facts["imports"] for facts in told(folder).values()],
        "limit_above_imports": limit,
        "peak_above_imports": watched.peaks,
        "local_shard_of_a_layer": layer // RANKS,
        "largest_extra_of_a_cut": most_extra(ranks, "cut"),
        "largest_extra_of_scoring": most_extra(ranks, "scoring"),
        "ranks": ranks,
    }
    check(result, request)
    return result


def request_for(name: str, folder: Path, shape: ModelShape) -> Request:
    cluster = Cluster(nodes=1, gpus_per_node=RANKS)
    return build_request(name, config_json(name), shape, config_of(name, folder), cluster)


def planned_cut(request: Request) -> Stage:
    after = changed(request, f"prune.ratio={CUTS[1]}").shape_at(STEPS)
    return plan_stages(request, after, after)[1]


def wide_peaks(name: str, folder: Path, ranks: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns (planned, measured) bytes of the largest peaks around the first cut, as in `plan_measured`."""
    shape = shape_from_config(config_json(name), name)
    write_ds_config(folder / "ds.json", shape)
    request = request_for(name, folder, shape)
    gone, found = [0.0, *CUTS.values()], dict[str, tuple[int, int]]()
    for when, steps in {"before": [1], "after": range(2, STEPS + 1)}.items():
        both = list[tuple[int, int]]()
        for step in steps:
            at = (
                changed(request, f"prune.ratio={gone[step - 1]}").shape_at(STEPS)
                if step > 1
                else request.shape
            )
            asked = nothing_ahead(request) if step == 1 else request
            planned = planned_peak(asked, at, scores=step <= len(CUTS))
            terms, _ = split_state(request, at)
            state = sum(terms.values()) - (step == 1) * terms["lora_moments"]
            for row in (rank["phases"] for rank in ranks):
                imports, measured = int(row["load"]["before"]), row[f"step {step}"]
                both.append(
                    (
                        planned + int(measured["before"]) - imports - state,
                        int(measured["peak"]) - imports,
                    )
                )
        found[when] = max(p for p, _ in both), max(m for _, m in both)
    if request.refits:
        found["in"] = cut_peaks(request, ranks)
    return found


def nothing_ahead(request: Request) -> Request:
    """Returns the request of a first step. DeepSpeed learns the order of modules, and fetches nothing ahead."""
    none = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    zero = request.ds_config["zero_optimization"] | none
    return replace(request, ds_config=request.ds_config | {"zero_optimization": zero})


def cut_peaks(request: Request, ranks: list[dict[str, Any]]) -> tuple[int, int]:
    cut, both = planned_cut(request), list[tuple[int, int]]()
    for row in (rank["phases"] for rank in ranks):
        imports, measured = int(row["load"]["before"]), row["cut 1"]
        beside = int(measured["before"]) - imports - cut.resident
        both.append((cut.peak + beside, int(measured["peak"]) - imports))
    return max(p for p, _ in both), max(m for _, m in both)


def most_extra(ranks: list[dict[str, Any]], phase: str) -> int:
    rows = [row for rank in ranks for name, row in rank["phases"].items() if name.startswith(phase)]
    return int(max(row["extra"] for row in rows))


def check(result: dict[str, Any], request: Request) -> None:
    dense = request.shape
    for rank in result["ranks"]:
        layers: list[dict[Kind, int]] = rank["layers_at_the_end"]
        kept = sum(
            count * dense.group_numel[kind] for layer in layers for kind, count in layer.items()
        )
        assert abs(kept / dense.linear_numel() - 0.5) < 0.01, rank["layers_at_the_end"]
        # Merging rounds every weight to bf16 once more, 2**-9 of it.
        assert abs(rank["loss_reloaded"] / rank["loss_trained"] - 1) < 2e-2, rank
    if (
        dense.hidden_size >= WIDE and not request.refits
    ):  # other memory of a process is small next to these tensors
        assert result["largest_extra_of_a_cut"] <= 3 * result["local_shard_of_a_layer"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMES, default=PUBLISHED)
    arguments = parser.parse_args()
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="wide-layers-") as scratch:
            folder = Path(scratch)
            (folder / "model").mkdir()
            write_json(folder / "model" / "config.json", config_json(name))
            write_random_weights(folder / "model")
            found = measure(name, folder) | {"world_size": RANKS, "steps": STEPS, "window": WINDOW}
            if name.startswith("tiny"):
                continue
            add_to(RESULT, name, found)
            if name in SIZES:  # the whole model would not show in a variant
                control = run_ranks(folder, found["limit_above_imports"], "--control")
                assert control.killed == f"rank-{RANKS - 1}", control
                kept = {"killed": control.killed, "peak_above_imports": control.peaks}
                add_to(RESULT, name, found | {"control": kept})


if __name__ == "__main__":
    main()
