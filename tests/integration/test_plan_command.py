"""Runs launch/plan.py as a user does. Checks stdout (an object or a table), one line on stderr, exit codes 0, 2, 3."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraprune_ds.cli.plan import main
from tests.support.launching import ROOT, run_to_end

Plan = Callable[[str], int]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.chdir(ROOT)

    def run(arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["launch/plan.py", *arguments.split()])
        return main()

    return run


def test_the_example_of_the_readme() -> None:
    command = "launch/plan.py llama-65b --nodes 4 --gpus-per-node 8 --gpu-memory 80 --json"
    as_on_a_login_node = ["env", "--unset=DS_ACCELERATOR", sys.executable]
    ended = run_to_end([*as_on_a_login_node, *command.split()], cwd=ROOT).check()
    found = json.loads(ended.out)  # exactly one object
    assert found["parameters"] == 65_285_660_672
    assert found["fits"] is True
    assert found["world_size"] == 32
    assert found["stages"][0]["state"]["weights"] == 65_285_660_672 * 2 // 32
    assert ended.err == ""


def test_what_does_not_fit_exits_with_3_and_says_what_to_change(
    plan: Plan, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--explain") == 2
    assert "--explain was removed" in capsys.readouterr().err
    assert (
        plan(
            "llama-7b --gpus-per-node 2 --gpu-memory 14 --nccl 1 --set prune.prune_every=100 --json"
        )
        == 3
    )
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert found["fits"] is False
    assert any(option["fits"] for option in found["options"])
    assert error.count("\n") == 1


def test_the_smallest_cluster_as_a_table(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    steps = "--set train.steps=100 --set train.epochs=null --set prune.prune_every=100"
    assert plan(f"llama-7b --gpu-memory 24 --smallest {steps}") == 0
    out = capsys.readouterr().out
    assert "llama-7b fits on " in out
    assert all(f"\n{row} " in out for row in ("peak", "  while", "+ repartition"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("llama-65b --nodes many", "--nodes"),
        ("llama-65b --gpu-memory nan", "--gpu-memory"),
        ("llama-65b --gpu-memory 2", "--reserve"),
        ("llama-65b --nodes 1000000", "--nodes"),
        ("llama-65b --nodes 3", "train.global_batch_size"),
        ("llama-65b --smallest --nodes 0", "--nodes"),
        ("./nowhere", "./nowhere"),
        ("", "--config"),
        ("embedded --server-memory 24", "prune.target"),
        ("embedded --set prune.target=4GX", "prune.target"),
        # refused by the run's own check of the model
        ("embedded --set prune.ratio=0.999", "prune.ratio"),
    ],
)
def test_bad_input_is_one_line(
    plan: Plan, capsys: pytest.CaptureFixture[str], arguments: str, named: str
) -> None:
    assert plan(arguments) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), error.startswith("error: ")) == ("", 1, True)
    assert named in error


def test_a_config_needs_no_folder_for_results(
    plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prune: {ratio: 0.3}\ntrain: {steps: 50}\n")
    assert plan(f"embedded --config {config} --gpu-memory 80 --json") == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_the_best_setting_for_each_card(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("embedded --cards --set train.distill_weight=0 --json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["gpus"], row["overrides"]) for row in rows] == 5 * [(1, [])]
    assert plan("llama-65b --cards --gpus-per-node 1 --nodes 1") == 0
    settings = [line.split()[3:] for line in capsys.readouterr().out.splitlines()[1:]]
    offload = ["--set", "deepspeed=ds_configs/zero3_offload.json"]
    assert settings == [*4 * [offload], ["--set", "model.frozen=int8"]]
