"""Prunes tiny models with the launchers of a user, from one command to a result folder."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.support import finished_runs
from tests.support.finished_runs import (
    HEAD_DIM,
    LAYERS,
    NAMES,
    STEPS,
    WINDOWS,
    Run,
    nearest_rows,
    snapshot,
)
from tests.support.launching import fork_ranks, read_json

CUTS = [3, 5]
# Weights and kernels are the same, in fp32. A sum over 24 x 31 predictions of about 6 nats may be in another order.
SAME = 1e-5
# In bf16 sums over windows in another batch shape round differently, 8 bits at a time.
SAME_BF16 = 5e-3
RESULTS = {"checkpoints", "model", "tensorboard", "metrics.jsonl", "config.yaml"}
RESULTS |= {"kept_groups.json", "kept_groups.png", "report.json", "status.json", "training.png"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Run]:
    return finished_runs.run_all(root)


@pytest.fixture(scope="module")
def stranger(runs: dict[str, Run], root: Path) -> dict[str, dict[str, Any]]:
    return finished_runs.perplexities(runs, root)


@pytest.fixture(params=NAMES)
def run(request: pytest.FixtureRequest, runs: dict[str, Run]) -> Run:
    return runs[request.param]


def test_a_run_ends_well_and_leaves_all_its_results_and_nothing_else(run: Run) -> None:
    assert run.ended.code == 0, run.ended.everything
    assert {path.name for path in run.folder.iterdir()} == RESULTS
    status = read_json(run.folder / "status.json")
    assert (status["state"], status["step"], status["steps"], status["error"]) == (
        "finished",
        STEPS,
        STEPS,
        None,
    )
    resolved = yaml.safe_load((run.folder / "config.yaml").read_text())
    given = yaml.safe_load(run.config.read_text())
    for section in ("prune", "train"):
        assert resolved[section] == resolved[section] | given[section]
    assert resolved["lora"]["lora_dropout"] > 0  # a default, resolved; some tests below rest on it


def test_the_terminal_shows_the_run_once_and_nothing_of_the_libraries(run: Run) -> None:
    out, err = run.ended.out, run.ended.err
    assert out.startswith(f"{STEPS} steps, {len(CUTS)} cuts, {run.case.ranks} ZeRO-3 rank"), (
        run.ended.everything
    )
    assert out.count("\nparameters ") == 1
    assert err.count("(dense model, ") == err.count("(exported model, ") == 1
    assert ("nothing is sharded" in err) == (run.case.ranks == 1)
    known = (
        "_dense: ",
        "model: ",
        f"{STEPS} steps of ",
        "criterion ",
        "world size 1: ",
        "step ",
        "writing the merged",
    )
    if run.case.launcher != "torchrun":  # which logs that it sets OMP_NUM_THREADS
        strange = [
            line for line in err.splitlines() if line and not any(word in line for word in known)
        ]
        assert strange == []


def test_report_holds_what_was_asked_for(run: Run) -> None:
    report = run.report
    found = [report[key] for key in ("world_size", "steps", "seed", "resumed_from")]
    assert found == [run.case.ranks, STEPS, 0, []]
    assert set(report["versions"]) >= {"torch", "deepspeed", "transformers", "peft"}
    assert len(report["peak_memory_bytes"]) == run.case.ranks
    assert all(10_000_000 < peak < 10_000_000_000 for peak in report["peak_memory_bytes"])
    assert all(math.isfinite(value) and value > 0 for value in report["perplexity"].values())


def test_parameters_are_those_of_the_files(run: Run, runs: dict[str, Run]) -> None:
    """Those of the first files in a chain."""
    first = runs.get(str(run.case.source), run)
    dense, start, pruned = (
        sum(tensor.numel() for tensor in tensors.values())
        for tensors in (first.before, run.before, run.after)
    )
    assert run.report["start"]["parameters"] == start
    title = f"# {first.source.name}, pruned\n"
    assert title in (run.folder / "model" / "README.md").read_text()
    found = run.report["measured"]
    assert found["values"]["parameters"] == {"value": pruned, "dense": dense, "basis": ""}
    assert found["removed"] == 1 - pruned / dense
    # a tied one is in neither
    assert ("lm_head.weight" in run.after) == ("lm_head.weight" in run.before)


def test_kept_groups_are_the_rows_of_the_source_that_the_model_has(run: Run) -> None:
    """Random rows are far apart and LoRA moves them little, so the nearest row of the source is the origin."""
    layers = read_json(run.folder / "kept_groups.json")["layers"]
    assert len(layers) == LAYERS
    for i, layer in enumerate(layers):
        keys, sources = (
            tensors[f"model.layers.{i}.self_attn.k_proj.weight"]
            for tensors in (run.after, run.before)
        )
        queries = run.after[f"model.layers.{i}.self_attn.q_proj.weight"].shape[0]
        assert layer["heads"] == nearest_rows(by_head(keys), by_head(sources))
        assert queries == len(layer["heads"]) * queries_per_head(run) * HEAD_DIM
        assert layer["heads_dense"] == sources.shape[0] // HEAD_DIM
        gates, sources = (
            tensors[f"model.layers.{i}.mlp.gate_proj.weight"] for tensors in (run.after, run.before)
        )
        assert layer["channels"] == nearest_rows(gates, sources)
        assert layer["channels_dense"] == sources.shape[0]
        assert run.after[f"model.layers.{i}.mlp.down_proj.weight"].shape[1] == len(
            layer["channels"]
        )


def by_head(weight: Tensor) -> Tensor:
    """(heads * HEAD_DIM, in_features) -> (heads, HEAD_DIM * in_features)."""
    return weight.reshape(weight.shape[0] // HEAD_DIM, -1)


def queries_per_head(run: Run) -> int:
    query, key = (
        run.before[f"model.layers.0.self_attn.{name}_proj.weight"].shape[0] for name in "qk"
    )
    return query // key


def test_every_cut_is_reported(run: Run) -> None:
    cuts = run.report["prune_steps"]
    ratio = run.report["config"]["prune"]["ratio"]
    assert [cut["step"] for cut in cuts] == CUTS
    assert [cut["target"] for cut in cuts] == [pytest.approx(ratio * (1 - 0.5**3)), ratio]
    linear_dense, linear_pruned = (
        sum(t.numel() for name, t in tensors.items() if name.endswith("_proj.weight"))
        for tensors in (run.before, run.after)
    )
    assert cuts[-1]["reached"] == 1 - linear_pruned / linear_dense
    assert abs(cuts[-1]["reached"] - ratio) < largest_group(run) / linear_dense
    assert cuts[-1]["removed_fraction"] == run.report["measured"]["removed"]
    for cut, following in itertools.pairwise(cuts):
        assert cut["weight_bytes_after"] == following["weight_bytes_before"]
    for cut in cuts:
        before, after = cut["weight_bytes_before"], cut["weight_bytes_after"]
        assert len(before) == len(after) == run.case.ranks
        assert all(b > a > 0 for b, a in zip(before, after, strict=True))
        assert (cut["bytes_sent"] > 0) == (run.case.ranks > 1)
        assert cut["seconds"] > 0


def largest_group(run: Run) -> int:
    """Counts the parameters of the largest unit of a cut: a group for `global`, one group per layer for `uniform`."""
    hidden = run.before["model.norm.weight"].numel()
    if run.case.prune.get("ranking") == "global":
        return (queries_per_head(run) + 1) * 2 * HEAD_DIM * hidden
    return LAYERS * 3 * hidden  # channels make up what heads cannot


def test_the_model_is_stock_where_a_stock_class_holds_it(run: Run) -> None:
    config = read_json(run.folder / "model" / "config.json")
    assert config["model_type"] == run.case.becomes
    widths = {
        x.shape
        for name, x in run.after.items()
        if "gate_proj.weight" in name or "k_proj.weight" in name
    }
    assert (len(widths) > 2) == run.case.becomes.startswith("pruned_")
    assert bool(list((run.folder / "model").glob("*.py"))) == run.case.becomes.startswith("pruned_")


def test_perplexities_are_those_a_stranger_measures(
    run: Run, stranger: dict[str, dict[str, Any]]
) -> None:
    tolerance = SAME if run.case.dtype == "float32" else SAME_BF16
    for name, key in ((run.case.name, "pruned"), (f"{run.case.name}_dense", "dense")):
        assert stranger[name]["windows"] == WINDOWS
        if key == "pruned":
            assert stranger[name]["dtype"] == f"torch.{run.case.dtype}"
        assert run.report["perplexity"][key] == pytest.approx(
            stranger[name]["perplexity"], rel=tolerance
        )


def test_metrics_and_tensorboard_tell_the_same_story(run: Run) -> None:
    steps = run.records("step")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [cut["step"] for cut in run.records("cut")] == CUTS
    named = {e["name"]: e["perplexity"] for e in run.records("evaluation") if e["name"] != "step"}
    assert named == run.report["perplexity"]
    assert [step["sparsity"] > 0 for step in steps] == [step["step"] > CUTS[0] for step in steps]
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert curve == [(step["step"], pytest.approx(step["loss"], rel=1e-6)) for step in steps]
    assert [event.step for event in events.Scalars("cut/reached")] == CUTS
    assert events.Scalars("perplexity/pruned")[-1].value == pytest.approx(named["pruned"], rel=1e-6)
    assert "weight_bytes/max" in events.Tags()["scalars"]


def test_evaluating_every_step_changes_nothing_and_equals_the_exported_model(
    runs: dict[str, Run],
) -> None:
    """Compares two processes with one seed and dropout. Training is bitwise the same, evaluated or not.

    The last shards, LoRA apart, measure like the merged model read back from disk, in fp32.
    """
    plain, watched = runs["uniform"], runs["watched"]
    looked = {
        e["step"]: e["perplexity"] for e in watched.records("evaluation") if e["name"] == "step"
    }
    assert list(looked) == [step for step in range(1, STEPS + 1) if step != CUTS[-1]]
    assert watched.report["perplexity"]["pruned"] == pytest.approx(looked[STEPS], rel=SAME)
    assert [e["name"] for e in plain.records("evaluation")] == ["dense", "after_last_cut", "pruned"]
    for key in ("loss", "grad_norm", "sparsity", "learning_rate", "weight_bytes"):
        assert [s[key] for s in plain.records("step")] == [
            s[key] for s in watched.records("step")
        ], key
    kept, kept_watched = (
        (run.folder / "kept_groups.json").read_bytes() for run in (plain, watched)
    )
    assert kept == kept_watched
    assert plain.report["perplexity"] == watched.report["perplexity"]
    assert all(plain.after[name].equal(tensor) for name, tensor in watched.after.items())


def test_a_second_start_shows_the_finished_run(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["uniform"]
    before = snapshot(run.folder)
    given = ["--config", str(run.config)]
    again = fork_ranks(given, tmp_path, ranks=run.case.ranks)[0].check()
    assert again.out == f"{run.folder} holds this run, finished:\n{run.ended.out}"
    assert again.err == ""
    assert snapshot(run.folder) == before
