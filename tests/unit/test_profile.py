"""Only the steps that are named leave a trace, on rank 0."""

import json
from pathlib import Path

import torch

from loraprune_ds.config import LoggingConfig, RunConfig
from loraprune_ds.train.loop import profiled


def test_named_steps_leave_a_trace_on_rank_0(tmp_path: Path) -> None:
    config = RunConfig(str(tmp_path), logging=LoggingConfig(profile_steps=[2, 3]))
    for step in (1, 2, 3):
        for rank in (1, 0) if step == 2 else (1,):
            with profiled(config, step, rank):
                torch.mm(torch.ones(4, 4), torch.ones(4, 4))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step-2.json"]
    events = json.loads((tmp_path / "profile" / "step-2.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    with profiled(RunConfig(str(tmp_path / "none")), 1, 0):
        pass
    assert not (tmp_path / "none").exists()
