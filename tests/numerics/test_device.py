"""Trainings on the simulated device, against the same on the CPU. Nothing of the host is mixed in.

The device computes with the CPU's kernels. Only the sizes of blocks differ, so that sums may end otherwise in the last
digits. 1e-5 is what the project promises of engines that add in another order.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle.models import ODD_SIZES, make_tiny_llama
from tests.support import device, engines
from tests.support.families import heavy, tiny_model
from tests.support.fsdp_training import REFIT, Training, train
from tests.support.ranks import RankPool
from tests.support.resuming import assert_equal_tensors, read_tensors

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
FISHER_REFIT = {"criterion": "fisher"} | REFIT


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    make_tiny_llama(root / "llama", layers=3, heads=10, kv_heads=5, head_dim=6, hidden=50, ffn=61)
    for family in ("t5", "qwen3_5_text"):
        tiny_model(family, seed=1).save_pretrained(root / family)
    return {path.name: path for path in root.iterdir()}


@pytest.mark.parametrize(
    ("world_size", "model", "settings"),
    [
        (1, "llama", {"prune": FISHER_REFIT, "evaluates": True}),
        (2, "llama", {"prune": FISHER_REFIT, "mesh": (2,), "offload": True}),
        (2, "llama", {"prune": REFIT}),
        heavy(2, "llama", {"prune": FISHER_REFIT, "mesh": (2,), "checkpointing": "reentrant"}),
        heavy(1, "t5", {"prune": FISHER_REFIT}),
        heavy(1, "qwen3_5_text", {"prune": FISHER_REFIT}),
        heavy(1, "llama", {"prune": REFIT, "checkpointing": "not reentrant", "parts": 2}),
        heavy(1, "llama", {"prune": REFIT, "checkpointing": "reentrant"}),
        heavy(1, "llama", {"prune": {}, "scale": 1024.0, "steps": 5}),
        heavy(2, "llama", {"prune": REFIT, "mesh": (2,), "checkpointing": "wrapper", "evaluates": True}),
        heavy(2, "llama", {"prune": {}, "mesh": (2,), "scale": 1024.0, "steps": 5}),
        heavy(2, "t5", {"prune": FISHER_REFIT, "mesh": (2,), "offload": True}),
        heavy(4, "llama", {"prune": FISHER_REFIT, "mesh": (2, 2), "r": 2}),
    ],
)  # fmt: skip
def test_a_training_on_the_device_equals_the_cpus(
    ranks: RankPool,
    device_ranks: RankPool,
    folders: dict[str, Path],
    tmp_path: Path,
    world_size: int,
    model: str,
    settings: dict[str, Any],
) -> None:
    on_cpu = Training(folders[model], **settings)
    on_device = replace(on_cpu, device=device.NAME)
    found = device_ranks.run(world_size, train, on_device, tmp_path / "device")[0]
    wanted = ranks.run(world_size, train, on_cpu, tmp_path / "cpu")[0]
    assert found.kept == wanted.kept
    assert found.kept[-1] != found.kept[0]
    torch.testing.assert_close(found.losses, wanted.losses, **CLOSE)
    torch.testing.assert_close(found.tensors, wanted.tensors, **CLOSE)
    exports = [read_tensors(tmp_path / name) for name in ("device", "cpu")]
    torch.testing.assert_close(*exports, **CLOSE)


def test_a_model_on_the_cpu_of_a_machine_with_a_device(
    ranks: RankPool, device_ranks: RankPool, folders: dict[str, Path], tmp_path: Path
) -> None:
    training = Training(folders["llama"], prune=FISHER_REFIT)
    found, wanted = (
        pool.run(1, train, training, tmp_path / name)[0]
        for name, pool in (("beside", device_ranks), ("alone", ranks))
    )
    assert (found.kept, found.losses) == (wanted.kept, wanted.losses)
    exports = [read_tensors(tmp_path / name) for name in ("beside", "alone")]
    assert_equal_tensors(*exports)


@pytest.mark.parametrize("world_size", [heavy(1), 2])
def test_zero_3_refits_on_the_device_as_on_the_cpu(
    ranks: RankPool, device_ranks: RankPool, tmp_path: Path, world_size: int
) -> None:
    folder = make_tiny_llama(tmp_path / "tiny", biases=True, **ODD_SIZES)
    runs = [
        pool.run(world_size, engines.refit, "zero3", folder)[0] for pool in (device_ranks, ranks)
    ]
    (before, after, loss), (_, wanted, wanted_loss) = runs
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    changed = [key for key, x in before.items() if not torch.equal(x, after[key])]
    assert len(changed) == 2 * len(engines.CUT_LAYERS)
    for key in changed:
        largest = (wanted[key] - before[key]).abs().max()
        # Adam has divided rounding by the roots of tiny moments
        assert (after[key] - wanted[key]).abs().max() < 1e-3 * largest, key
