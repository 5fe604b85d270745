"""Bytes by storage on the simulated device: what a cut takes, and the plan's state and peaks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.config_types import Frozen
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.benchmarks.plan_measured import HIGHEST, LOWEST
from tests.benchmarks.wide_layers import write_ds_config
from tests.oracle.models import make_tiny_llama
from tests.support import device
from tests.support.counting import Case as Training
from tests.support.counting import shards_of_a_cut
from tests.support.families import heavy
from tests.support.plan_bytes import bytes_beside_plan, bytes_of_wide_layers
from tests.support.plan_cases import Case
from tests.support.ranks import RankPool

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))
HEAD_DIM, WINDOW = 32, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights outweigh what is constant: six layers, for two have no layer to spare."""
    sizes: dict[str, Any] = {"hidden": 256, "ffn": 704, "heads": 8, "kv_heads": 4}
    folder = tmp_path_factory.mktemp("plan")
    return make_tiny_llama(folder, layers=6, dtype="bfloat16", head_dim=HEAD_DIM, **sizes)


REFIT: dict[str, Any] = {"compensate": "least_squares"}
LOCAL: dict[str, Any] = {"deepspeed": None}
CHECKPOINTS: dict[str, Any] = {"checkpointing": True}


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, LOCAL | {"criterion": "fisher", "window": 4 * WINDOW}),
        (1, LOCAL | REFIT | {"frozen": "nf4"}),
        (2, REFIT),
        (2, CHECKPOINTS | {"frozen": "nf4"}),
        heavy(1, LOCAL | REFIT),
        heavy(1, {}),
        heavy(2, {}),
        heavy(2, CHECKPOINTS | {"criterion": "fisher"}),
        heavy(2, CHECKPOINTS | {"frozen": "int8"}),
    ],
)  # fmt: skip
def test_the_plan_has_the_counted_bytes(
    device_ranks: RankPool, folder: Path, world_size: int, options: dict[str, Any]
) -> None:
    case = Case(folder, protected_first=0, **options)
    ranks = device_ranks.run(world_size, bytes_beside_plan, case)
    for found in ranks:
        # two buffers of rotary angles, a seed, and of DeepSpeed a flag. A score's sum, and a refit's last two steps
        rest = 4 * HEAD_DIM + (16 if case.deepspeed is None else 9)
        steps = 2 * 8 * case.window if case.compensate != "none" else 0
        assert found.states == [rest, rest + 8 * (case.deepspeed is not None) + steps]
        if case.compensate == "none":
            assert found.cut <= (2 if case.deepspeed else 1)
    for when in ranks[0].peaks:  # the plan is for the rank that needs most
        planned, counted = map(max, zip(*(found.peaks[when] for found in ranks), strict=True))
        unseen = ranks[0].unseen * (when == "in")
        assert planned >= LOWEST * counted, (when, planned, counted)
        assert planned <= HIGHEST * (counted + unseen), (when, planned, counted)


@pytest.mark.heavy  # test_plan_measured has one in CI
@pytest.mark.parametrize("frozen", ["nf4", None, "int8"])
def test_wide_layers_gather_what_is_planned(
    device_ranks: RankPool, folder: Path, tmp_path: Path, frozen: Frozen | None
) -> None:
    """Above a width linears are gathered one by one, and few are fetched ahead."""
    write_ds_config(tmp_path / "few.json", open_pretrained(folder).shape)
    few = str(tmp_path / "few.json")
    case = Case(folder, few, frozen=frozen, checkpointing=True, criterion="fisher")
    for found in device_ranks.run(2, bytes_of_wide_layers, replace(case, protected_first=0)):
        for when in ("before", "after"):
            planned, counted = found.peaks[when]
            assert LOWEST * counted <= planned <= HIGHEST * counted, (when, planned, counted)


# What a cut takes above what is alive, in shards of a layer. It moves what stays twice: its parts and the buffer that
# leaves, then that and what arrives. One process and DDP cut one tensor after the other.
SHARDS = {"one": 1.0, "ddp": 1.0, "fsdp2": 2.0, "zero3": 2.0}


@pytest.mark.parametrize("engine", SHARDS)
def test_a_cut_takes_few_shards_of_a_layer(device_ranks: RankPool, engine: str) -> None:
    """The promise is three at most."""
    training = Training(engine, "fisher", layers=4, hidden=128)
    taken = device_ranks.run(1 if engine == "one" else 2, shards_of_a_cut, training)
    assert max(taken) <= SHARDS[engine], taken
