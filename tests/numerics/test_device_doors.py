"""The commands of launch/ on the simulated device, against the same on the CPU.

The tolerance and its reason are those of test_device.py.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.support import device, resuming
from tests.support.chat_model import make_chat_model
from tests.support.device_doors import run_and_measure, write_chats
from tests.support.ranks import RankPool

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))
SECTIONS: dict[str, dict[str, Any]] = {
    "prune": resuming.REFITS | {"criterion": "fisher"},
    "train": {"steps": 8, "distill_weight": 0.5},
    "checkpoint": {"every": None},
}


@pytest.mark.heavy
def test_the_commands_run_measure_and_answer(
    ranks: RankPool, device_ranks: RankPool, tmp_path: Path
) -> None:
    given = resuming.write_run(tmp_path, **SECTIONS)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "alpha beta gamma"}\n{"prompt": "zeta"}\n')
    (perplexity, answers), (wanted, wanted_answers) = (
        pool.run(1, run_and_measure, given, ["deepspeed=null"], tmp_path / name, prompts)[0]
        for name, pool in (("device", device_ranks), ("cpu", ranks))
    )
    assert perplexity == pytest.approx(wanted, rel=1e-5)
    assert answers == wanted_answers
    assert resuming.metrics(tmp_path / "device", "cut")


@pytest.mark.heavy
def test_a_model_writes_the_same_chats(
    ranks: RankPool, device_ranks: RankPool, tmp_path: Path
) -> None:
    model = make_chat_model(tmp_path / "model")
    found, wanted = (
        pool.run(1, write_chats, model, tmp_path / f"{name}.jsonl")[0]
        for name, pool in (("device", device_ranks), ("cpu", ranks))
    )
    assert found == wanted
