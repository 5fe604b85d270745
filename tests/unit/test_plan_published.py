"""Plans the shipped run configs of published models, and again every run whose peaks were recorded."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict, load_config
from loraprune_ds.files import read_json
from loraprune_ds.model.read_shape import read_model_config, shape_from_config
from loraprune_ds.plan.cluster import GIB, Cluster
from loraprune_ds.plan.plan import Plan, make_plan
from loraprune_ds.plan.request import build_request, make_request
from tests.benchmarks.plan_measured import HIGHEST, LOWEST, RESULT, cases, peaks, save_1b_config
from tests.benchmarks.wide_layers import RESULT as WIDE
from tests.benchmarks.wide_layers import wide_peaks
from tests.published import MIXTURES, PUBLISHED, T5_11B

CONFIGS = Path("launch/configs")
NODES = {"one": 1, "two": 2, "four": 4}
MODERN = {**PUBLISHED, "qwen3-30b-a3b": MIXTURES["Qwen3-30B-A3B"]}


@pytest.mark.parametrize("name", MODERN)
def test_the_run_fits_where_it_is_meant_to_as_the_page_says(name: str) -> None:
    source, billions, *_ = MODERN[name]
    shape, path = shape_from_config(source, name), CONFIGS / f"{name}.yaml"
    assert shape.total_numel() / 1e9 == pytest.approx(billions, rel=0.003)  # as published, rounded
    meant = re.search(r"Meant for (\w+) nodes? of 8 GPUs", path.read_text())
    assert meant
    plan = make_plan(build_request(name, source, shape, load_config(path), Cluster(NODES[meant[1]], 8)))
    assert plan.fits
    assert plan.request.micro_batches == 1
    assert row(path, plan) in (CONFIGS / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama3.1-8b", []),
        ("qwen3-vl-8b", []),
        ("qwen3.6-27b", ["model.frozen=int8", "prune.compensate=none"]),
        ("qwen3.6-35b-a3b", ["model.frozen=int8", "train.distill_weight=0"]),
        ("gemma4-31b", ["model.frozen=int8", "prune.compensate=none"]),
        ("gemma4-26b-a4b", ["model.frozen=int8"]),
        ("glm-4.7-flash", ["model.frozen=int8"]),
        ("flan-t5-xl", ["model.path=t5-11b", "prune.compensate=none"]),
    ],
)
def test_one_gpu_holds_the_run_of_a_node(name: str, overrides: list[str]) -> None:
    source = T5_11B if "model.path=t5-11b" in overrides else PUBLISHED[name][0]
    path = CONFIGS / f"{name}.yaml"
    shape, config = shape_from_config(source, name), load_config(path, overrides)
    plan = make_plan(build_request(name, source, shape, config, Cluster(1, 1)))
    assert plan.fits
    assert row(path, plan, overrides) in (CONFIGS / "README.md").read_text()


def row(path: Path, plan: Plan, overrides: Sequence[str] = ()) -> str:
    total, request = plan.in_all, plan.request
    hours = " to ".join(dict.fromkeys(f"{seconds / 3600:.1f}" for seconds in (total.at_least, total.at_most)))
    memory = plan.device_bytes / GIB
    sent, saved = total.bytes_sent / 1e9, plan.checkpoint_bytes / 1e9
    run = ", ".join(f"`{part}`" for part in (path.name, *overrides))
    return f"| {run} | {request.world_size} | {memory:.0f} | {hours} | {sent:,.0f} | {saved:.0f} |"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_other_config_has_the_recipe(path: Path) -> None:
    config, default = load_config(path), RunConfig("unused")
    assert replace(config.prune, ratio=0.5, prune_every=10, channel_multiple=64, tensor_parallel=1) == default.prune
    assert (config.train.distill_weight, config.train.distill_temperature) == (0.25, 2.0)
    if config.model.path != "embedded":
        tokens = (config.train.steps or 0) * config.train.global_batch_size * config.data.window
        assert config.data.format in ("chat", "seq2seq")
        assert 10e6 <= tokens <= 100e6


# Nodes and GPUs that each of the paper's runs is meant for.
PAPER = {"7b": (1, 8), "7b-single-shot": (1, 8), "13b": (1, 8), "30b": (2, 8), "65b": (4, 8), "65b-int8": (1, 1)}


@pytest.mark.parametrize(("name", "cluster"), PAPER.items())
def test_the_papers_runs_fit_where_they_are_meant_to_and_follow_its_line(name: str, cluster: tuple[int, int]) -> None:
    size, _, kind = name.partition("-")
    request = make_request(f"llama-{size}", Cluster(*cluster), config_path=str(CONFIGS / f"paper/llama-{name}.yaml"))
    prune, train, data = request.config.prune, request.config.train, request.config.data
    assert make_plan(request).fits
    assert (prune.criterion, prune.normalize, prune.ranking, prune.compensate) == ("lora", "l2", "uniform", "none")
    assert (prune.ratio, train.global_batch_size, train.recovery_steps, train.distill_weight) == (0.5, 128, 0, 0)
    assert request.config.model.frozen == ("int8" if kind == "int8" else None)
    if kind == "single-shot":
        assert request.pruning.schedule.cut_steps() == [request.steps]
        assert train.learning_rate < 1e-9  # LoRA must not learn
        return
    assert (train.epochs, train.learning_rate, train.lr_scheduler) == (2, 1e-4, "cosine")
    assert data.path == ("MBZUAI/LaMini-instruction" if size == "7b" else "allenai/c4")
    if size != "7b":
        assert (request.steps, request.steps_known, len(data.data_files or [])) == (312, True, 1)


def test_every_run_of_the_paper_is_held_to_it() -> None:
    assert {path.stem.removeprefix("llama-") for path in (CONFIGS / "paper").glob("*")} == PAPER.keys()


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "gpt-oss-120b", "Qwen3-235B-A22B"])
def test_a_mixture_fits_on_a_node_and_gathers_a_layer_at_a_time(name: str) -> None:
    """A layer that is gathered whole is copied, so it counts twice. Before a small one ends, others are fetched."""
    source, run = MIXTURES[name][0], {"output_dir": "unused", "prune": {"ratio": 0.5}}
    config = config_from_dict(run | {"train": {"steps": 100, "gradient_checkpointing": True, "distill_weight": 0}})
    plan = make_plan(build_request(name, source, shape_from_config(source, name), config, Cluster(1, 8)))
    assert plan.fits
    shape, size = plan.request.shape, plan.request.element_size
    layers = [plan.request.storage.stored(shape, size, i).values() for i in range(len(shape.layers))]
    layer = max(sum(x.element_size * math.prod(x.shape) for x in held) for held in layers)
    fetched, head = size * plan.request.fetch.max_live_parameters, size * shape.vocab_size * shape.hidden_size
    gathered = max(phase.get("gathered_weights", 0) for stage in plan.stages for phase in stage.phases.values())
    assert gathered <= (2.1 * layer if layer > fetched else 2 * layer + fetched + head)


@pytest.mark.parametrize(("folder", "name"), [("paper", "llama-65b"), (".", "llama3.3-70b")])
def test_with_hpz_the_largest_fit_and_gather_inside_their_nodes(folder: str, name: str) -> None:
    source = PUBLISHED[name][0] if name in PUBLISHED else read_model_config(name)
    changes = ["deepspeed=ds_configs/zero3_multinode_hpz.json", "train.distill_weight=0"]
    config = load_config(CONFIGS / folder / f"{name}.yaml", changes)
    plan = make_plan(build_request(name, source, shape_from_config(source, name), config, Cluster(4, 8)))
    assert plan.fits
    assert plan.last_step.between_nodes < 0.01 * sum(plan.last_step.sent.values())


# Every recorded run of `plan_measured.py` and `wide_layers.py`. What a process held beside its state when a step began
# (Python's objects, kernels) is added to the plan


@pytest.mark.parametrize("name", sorted(read_json(RESULT)))
def test_the_peaks_of_a_recorded_run_are_planned(tmp_path: Path, name: str) -> None:
    save_1b_config(tmp_path / "1b")
    model, ranks = name.split(", ")
    request = cases(model, tmp_path).request(int(ranks.split()[0]))
    check(peaks(request, read_json(RESULT)[name]["ranks"]))


@pytest.mark.parametrize("name", [name for name in sorted(read_json(WIDE)) if name != "bin"])
def test_the_peaks_of_true_widths_are_planned(tmp_path: Path, name: str) -> None:
    check(wide_peaks(name, tmp_path, read_json(WIDE)[name]["ranks"]))


def check(found: dict[str, tuple[int, int]]) -> None:
    assert list(found) == ["before", "after"]
    for when, (planned, measured) in found.items():
        assert LOWEST <= planned / measured <= HIGHEST, (when, planned, measured)
