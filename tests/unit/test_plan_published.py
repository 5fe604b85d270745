"""Plans the shipped run configs of published models, and again every run whose peaks were recorded."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict, read_config
from loraprune_ds.files import read_json
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.plan import make_plan
from loraprune_ds.plan.request import Run, build_request, read_run
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.benchmarks.plan_measured import HIGHEST, LOWEST, RESULT, cases, peaks, save_1b_config
from tests.benchmarks.wide_layers import RESULT as WIDE
from tests.benchmarks.wide_layers import wide_peaks
from tests.support.published import MIXTURES, PUBLISHED, T5_11B

CONFIGS = Path("launch/configs")
NODES = {"one": 1, "two": 2, "four": 4}
MODERN = {**PUBLISHED, "qwen3-30b-a3b": MIXTURES["Qwen3-30B-A3B"]}


ON_ONE_GPU = {
    "llama3.1-8b": [],
    "qwen3-vl-8b": [],
    "qwen3.6-27b": ["model.frozen=int8", "prune.compensate=none"],
    "muse-glimmer-30b": ["model.frozen=int8", "prune.compensate=none"],
    "qwen3.6-35b-a3b": ["model.frozen=int8", "train.distill_weight=0"],
    "gemma4-31b": ["model.frozen=int8", "prune.compensate=none"],
    "gemma4-26b-a4b": ["model.frozen=int8"],
    "glm-4.7-flash": ["model.frozen=int8"],
    "flan-t5-xl": ["model.path=t5-11b", "prune.compensate=none"],
}


@pytest.mark.parametrize(
    ("name", "one_gpu"), [*((x, False) for x in MODERN), *((x, True) for x in ON_ONE_GPU)]
)
def test_the_run_fits_where_it_is_meant_to(name: str, one_gpu: bool) -> None:
    (source, billions, *_), path = MODERN[name], CONFIGS / f"{name}.yaml"
    overrides = ON_ONE_GPU[name] if one_gpu else []
    source = T5_11B if "model.path=t5-11b" in overrides else source
    shape, config = shape_from_config(source, name), config_from_dict(read_config(path, overrides))
    meant = re.search(r"Meant for (\w+) nodes? of 8 GPUs", path.read_text())
    assert meant
    plan = make_plan(
        build_request(
            name, source, shape, config, Cluster(1, 1) if one_gpu else Cluster(NODES[meant[1]], 8)
        )
    )
    assert plan.fits
    if not one_gpu:
        # as published, rounded
        assert shape.total_numel() / 1e9 == pytest.approx(billions, rel=0.003)
        assert plan.request.micro_batches == 1


def run_of(name: str, overrides: Sequence[str] = ()) -> Run:
    """Reads a shipped config and the published sizes of its model."""
    path = CONFIGS / f"{name}.yaml"
    if name.startswith("paper/"):
        return read_run("-".join(path.stem.split("-")[:2]), config_path=str(path))
    source = MODERN[name.removesuffix("-24gb")][0]
    shape = shape_from_config(source, name)
    return Run(name, source, shape, config_from_dict(read_config(path, overrides)))


def test_an_8b_fits_on_24_gb() -> None:
    run = run_of("llama3.1-8b-24gb")
    assert make_plan(build_request(*run, Cluster(1, 1, gpu_memory=24))).fits


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_other_config_has_the_recipe(path: Path) -> None:
    config, default = config_from_dict(read_config(path)), RunConfig("unused")
    # of a model
    sizes = {"ratio": 0.5, "channel_multiple": 64, "tensor_parallel": 1, "head_ratio": None}
    assert replace(config.prune, prune_every=10, **sizes) == default.prune
    assert (config.train.distill_weight, config.train.distill_temperature) == (0.25, 2.0)
    if config.model.path != "embedded":
        tokens = (config.train.steps or 0) * config.train.global_batch_size * config.data.window
        assert config.data.format in ("chat", "seq2seq")
        assert 10e6 <= tokens <= 100e6


# Nodes and GPUs that each of the paper's runs is meant for.
PAPER = {
    "7b": (1, 8),
    "7b-single-shot": (1, 8),
    "13b": (1, 8),
    "30b": (2, 8),
    "65b": (4, 8),
    "65b-int8": (1, 1),
    "65b-nf4": (1, 1),
}


@pytest.mark.parametrize("path", sorted((CONFIGS / "paper").glob("*")), ids=lambda path: path.stem)
def test_the_papers_runs_fit_where_they_are_meant_to_and_follow_its_line(path: Path) -> None:
    _, size, kind = f"{path.stem}-".split("-", 2)
    cluster = PAPER[path.stem.removeprefix("llama-")]
    run = read_run(f"llama-{size}", config_path=str(path))
    request = build_request(*run, Cluster(*cluster))
    prune, train = request.config.prune, request.config.train
    assert make_plan(request).fits
    line = ("lora", "l2", "uniform", "none")
    if kind == "nf4-":  # the recipe
        line = ("fisher", "step", "global", "least_squares")
    assert (prune.criterion, prune.normalize, prune.ranking, prune.compensate) == line
    assert (prune.ratio, train.global_batch_size, train.recovery_steps, train.distill_weight) == (
        0.5,
        128,
        0,
        0,
    )
    assert request.config.model.frozen == {"int8-": "int8", "nf4-": "nf4"}.get(kind)
    if kind == "single-shot-":
        assert request.schedule.cut_steps == [request.schedule.steps]
        assert train.learning_rate < 1e-9  # LoRA must not learn
        return
    assert (train.epochs, train.learning_rate, train.lr_scheduler) == (2, 1e-4, "cosine")


# Every recorded run of `plan_measured.py` and `wide_layers.py`. What a process held beside its state when a step began
# (Python's objects, kernels) is added to the plan
RECORDED: list[Any] = [(False, x) for x in sorted(read_json(RESULT))]
RECORDED += [(True, x) for x in sorted(read_json(WIDE)) if x != "bin"]


@pytest.mark.parametrize(("wide", "name"), RECORDED)
def test_the_peaks_of_a_recorded_run_are_planned(tmp_path: Path, wide: bool, name: str) -> None:
    if wide:
        found = wide_peaks(name, tmp_path, read_json(WIDE)[name]["ranks"])
    else:
        save_1b_config(tmp_path / "1b")
        model, ranks = name.split(", ")
        found = peaks(
            cases(model, tmp_path).request(int(ranks.split()[0])), read_json(RESULT)[name]["ranks"]
        )
    assert list(found)[:2] == ["before", "after"]  # and "in" a cut that refits
    for when, (planned, measured) in found.items():
        assert LOWEST <= planned / measured <= HIGHEST, (when, planned, measured)
