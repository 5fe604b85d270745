"""Int8 weights give the bits of the same model with the weights that they stand for, on 1 to 3 ZeRO-3 ranks."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.model.frozen import DTYPES, SCALE, WEIGHT
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.int8 import Int8
from loraprune_ds.pretrained.weight_files import as_on_disk, write_weight_file
from loraprune_ds.pruning.replay import refit_by_replay
from loraprune_ds.pruning.step import all_groups
from tests.support.cutting import whole_state
from tests.support.driver import (
    Job,
    Outcome,
    assert_same_outcome,
    build,
    family_job,
    tiny_job,
    train,
)
from tests.support.families import LLAMA_LINEARS, MIXED, MIXTURES, TINY, families
from tests.support.int8_models import open_int8
from tests.support.ranks import RankPool
from tests.support.refusals import refused
from tests.support.resuming import assert_equal_tensors

STEPS = 6
# A hidden axis of 72 has a short last block. 173 channels divide by no number of ranks.
SIZES: dict[str, Any] = {
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 8,
    "hidden": 72,
    "ffn": 173,
    "biases": True,
}
CUT_LAYERS = (1, 2)


# What the ranks do, and the model that they compute with


def write_dequantised(source: Path, folder: Path, dtype: str) -> Path:
    """Writes the model that int8 weights compute with, in `dtype`."""
    pretrained = open_int8(source)
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {
        name: pretrained.weights.read_full(name, DTYPES[dtype])
        for name in pretrained.shape.parameters()
    }
    write_weight_file(folder / "model.safetensors", as_on_disk(tensors, pretrained.shape.pieces()))
    return folder


def read_left(job: Job, outcome: Outcome) -> dict[str, Tensor]:
    """Reads what the cuts of a run leave of the source, as a resumed run would."""
    pretrained = open_int8(job.folder)
    kinds = pretrained.shape.kinds
    keep = [
        LayerKeep(zip(kinds, map(torch.tensor, kept), strict=True)) for kept in outcome.kept[-1]
    ]
    left, dtype = pretrained.weights.cut(keep), DTYPES[job.dtype]
    held = left.shape.stored(dtype.itemsize, int8=left.int8)
    return {
        n: left.read_stored(n, 0, torch.Size(x.shape).numel(), dtype).view(x.shape)
        for n, x in held.items()
    }


def refit_once(job: Job) -> dict[str, Tensor]:
    """Makes two steps and a refit for a cut of layers 1 and 2. Returns all tensors after it."""
    trainer = build(job)
    passes = trainer.pruner.passes
    assert passes is not None
    for step in (1, 2):
        trainer.step(step)
    chosen = LayerKeep(heads=torch.tensor([0, 2]), channels=torch.arange(0, 173, 2))
    everything = all_groups(trainer.model.shape)
    keep = [chosen if i in CUT_LAYERS else k for i, k in enumerate(everything)]
    refit_by_replay(trainer.model, keep, passes.passes(), 2)
    return whole_state(trainer)


def requantised(dense: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns what holds the linears of `whole_state` as int8, by name."""
    held: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        linear = next(
            (x for x in LLAMA_LINEARS if name.endswith(f"{x.name}.base_layer.{WEIGHT}")), None
        )
        if linear is None:
            held[name] = tensor
            continue
        parts = Int8(linear.axis).split(tensor, dtype)
        held |= {name.removesuffix(WEIGHT) + part: value for part, value in parts.items()}
    assert any(name.endswith(SCALE) for name in held)
    return held


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("int8")
    sizes = SIZES | {"dtype": "bfloat16"}
    prune = {"ratio": 0.3, "prune_every": 2}
    return tiny_job(folder, prune, steps=STEPS, model=sizes, dtype="bfloat16", frozen="int8")


@pytest.fixture(scope="module")
def meant(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dequantised(job.folder, tmp_path_factory.mktemp("int8") / "meant", "bfloat16")


@pytest.mark.parametrize("world_size", [1, 3])  # test_so_do_other_settings has two
def test_it_trains_and_cuts_as_the_weights_it_means(
    ranks: RankPool, job: Job, meant: Path, world_size: int
) -> None:
    train_as_meant(ranks, world_size, job, meant)


def train_as_meant(ranks: RankPool, world_size: int, job: Job, meant: Path) -> dict[str, Tensor]:
    """Trains with int8 weights and with those they stand for. Returns what a resumed run would read of the source."""
    found, expected = (
        ranks.run(world_size, train, x)[0] for x in (job, replace(job, folder=meant, frozen=None))
    )
    assert_same_outcome(found, expected)
    left = read_left(job, found)
    assert_equal_tensors(left, found.frozen)
    assert all(held == planned for held, planned in found.state_bytes)
    return left


@pytest.mark.parametrize("family", families("mixtral", "gpt_oss", of=MIXTURES))
def test_so_do_experts(ranks: RankPool, tmp_path: Path, family: str) -> None:
    """An expert has blocks of 64 and 6 channels, and GPT-OSS has them transposed. A rank owns parts of experts."""
    world_size = {"mixtral": 3, "gpt_oss": 2}.get(family, 1)
    sizes: dict[str, Any] = {
        key: 70 for key in ("intermediate_size", "moe_intermediate_size") if key in TINY[family]
    }
    sizes |= {"dtype": torch.bfloat16, "hidden_size": 100}
    prune: dict[str, Any] = {
        "ratio": 0.3,
        "prune_every": 2,
        "protected_first": 0,
        "protected_last": 0,
    }
    experts, _ = family_job(
        tmp_path, family, prune, steps=STEPS, model=sizes, dtype="bfloat16", frozen="int8"
    )
    meant = write_dequantised(experts.folder, tmp_path / "meant", "bfloat16")
    left = train_as_meant(ranks, world_size, experts, meant)
    assert sum(".experts." in n and x.dtype == torch.int8 for n, x in left.items()) == (
        2 if family in MIXED else 4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "micro_batch_size": 1, "criterion": "lora"},
        {"criterion": "fisher", "deepspeed": "ds_configs/zero3_offload.json"},
        {"criterion": "magnitude", "ranking": "global", "normalize": "none", "dtype": "float32"},
        {"criterion": "fisher", "normalize": "none", "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_so_do_other_settings(
    ranks: RankPool, job: Job, tmp_path: Path, changes: dict[str, Any]
) -> None:
    of_job = {key: changes[key] for key in changes.keys() & {field.name for field in fields(Job)}}
    prune = job.prune | {key: changes[key] for key in changes.keys() - of_job.keys()}
    changed = replace(job, prune=prune, **of_job)
    train_as_meant(
        ranks, 2, changed, write_dequantised(job.folder, tmp_path / "meant", changed.dtype)
    )


def test_a_refit_is_quantised_by_the_owner_of_the_layer(
    ranks: RankPool, job: Job, meant: Path
) -> None:
    everywhere = {"protected_first": 0, "protected_last": 0, "warmup_fraction": 0.5}
    refit = replace(job, prune=job.prune | everywhere | {"compensate": "least_squares"})
    found, dense = (
        ranks.run(3, refit_once, x)[0] for x in (refit, replace(refit, folder=meant, frozen=None))
    )
    expected = requantised(dense, torch.bfloat16)
    assert found.keys() == expected.keys()
    compared = 0
    for name, tensor in expected.items():
        refitted = any(f"layers.{i}." in name for i in CUT_LAYERS) and (
            "o_proj" in name or "down_proj" in name
        )
        if "base_layer.weight" not in name or refitted:  # the others were not quantised again
            assert torch.equal(found[name], tensor), name
            compared += refitted and "base_layer" in name
    assert compared == 2 * 2 * 3  # weight, scale and bias


def test_a_weight_that_is_not_finite_is_named_on_every_rank(job: Job, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((job.folder / "config.json").read_bytes())
    path = next(job.folder.glob("*.safetensors"))
    tensors, name = load_file(path), "model.layers.2.mlp.down_proj.weight"
    tensors[name][71, 172] = math.inf
    save_file(tensors, tmp_path / path.name)
    # its own: one rank stops earlier, and DeepSpeed compares how many parameters both made
    pool = RankPool()
    errors = pool.run(2, refused, build, replace(job, folder=tmp_path))
    pool.close()
    assert errors[0] == errors[1]
    assert all(part in errors[0] for part in ("rank 1", str(tmp_path / path.name), name))
