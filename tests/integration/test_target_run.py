"""A run over two ranks with `prune.target` and a reporter: the target is reached, and rank 0 alone reports."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from loraprune_ds.config import RunConfig
from tests.integration.launching import read_json
from tests.integration.resuming import config_for, run_here, write_run
from tests.ranks import RankPool


def run_with_wandb(config: RunConfig) -> list[tuple[str, Any]]:
    """Returns what this rank has sent to a wandb that only remembers."""
    calls: list[tuple[str, Any]] = []
    wandb = SimpleNamespace(
        run=object(),
        errors=SimpleNamespace(Error=RuntimeError),
        init=lambda **settings: calls.append(("init", settings["config"]["prune"]["target"])),
        define_metric=lambda name, step_metric: None,
        log=lambda values: calls.append(("log", sorted(values))),
        Image=lambda path: path,
        finish=lambda: calls.append(("finish", None)),
        __spec__=object(),  # for importlib.util.find_spec
    )
    with mock.patch.dict(sys.modules, {"wandb": wandb, "wandb.errors": wandb.errors}):  # type: ignore[dict-item]
        run_here(config)
    return calls


def test_a_target_is_reached_on_two_ranks_and_rank_0_alone_reports(ranks: RankPool, tmp_path: Path) -> None:
    path = write_run(tmp_path, logging={"report_to": ["wandb"]}, prune={"ratio": None, "target": "0.08M"})
    config = config_for(path, tmp_path / "out", "train.steps=6", "prune.prune_every=2")
    first, second = ranks.run(2, run_with_wandb, config)
    target = read_json(tmp_path / "out" / "report.json")["target"]
    assert target["dense"] > 80_000 >= target["reached"]
    # One step of `uniform`: a channel of each layer, which is 64 elements in each of three linears.
    assert target["reached"] > 80_000 - 3 * 3 * (64 + 1)
    assert second == []
    assert first[0] == ("init", "0.08M")
    logged = [values for name, values in first if name == "log"]
    assert sum("train/loss" in values for values in logged) == 6
    assert any("cut/reached" in values for values in logged)
    assert logged[-2:] == [["training"], ["kept_groups"]]
    assert first[-1] == ("finish", None)
