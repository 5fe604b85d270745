"""Int8 and NF4 weights give the bits of the same model with the weights that they stand for.

On 1 to 3 ranks of ZeRO-3, and in one process.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.model.frozen import DTYPES, SCALE, WEIGHT, Blocks
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.pretrained.pretrained import open_pretrained
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
    open_stored,
    tiny_job,
    train,
)
from tests.support.families import MIXTURES, TINY, families, heavy
from tests.support.paper import OPEN
from tests.support.ranks import RankPool
from tests.support.refusals import refused
from tests.support.resuming import assert_equal_tensors

STEPS = 6
# 173 channels divide by no number of ranks.
SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "ffn": 173, "biases": True}
CUT_LAYERS = (1, 2)


# What the ranks do, and the model that they compute with


def write_dequantised(job: Job, folder: Path) -> Path:
    """Writes the model that quantised weights compute with."""
    pretrained = open_stored(job)
    folder.mkdir()
    (folder / "config.json").write_bytes((job.folder / "config.json").read_bytes())
    tensors = {
        name: pretrained.weights.read_full(name, DTYPES[job.dtype])
        for name in pretrained.shape.parameters()
    }
    write_weight_file(folder / "model.safetensors", as_on_disk(tensors, pretrained.shape.pieces()))
    return folder


def read_left(job: Job, outcome: Outcome) -> dict[str, Tensor]:
    """Reads what the cuts of a run leave of the source, as a resumed run would."""
    pretrained = open_stored(job)
    kinds = pretrained.shape.kinds
    keep = [
        LayerKeep(zip(kinds, map(torch.tensor, kept), strict=True)) for kept in outcome.kept[-1]
    ]
    left, dtype = pretrained.weights.cut(keep), DTYPES[job.dtype]
    held = pretrained.storage.stored(left.shape)
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


def requantised(job: Job, dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what stores the linears of `whole_state`, by name."""
    opened = open_stored(job)
    shape = opened.shape
    formats: dict[str, Blocks] = {}
    for layer, linear in shape.linears():
        path = f"{shape.prefix(layer)}{linear.linear}"
        formats[f"{path}.base_layer.{WEIGHT}"] = opened.weights.formats[f"{path}.{WEIGHT}"]
    held: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        stored_as = formats.get(name.removeprefix("base_model.model."))
        if stored_as is None:
            held[name] = tensor
            continue
        parts = stored_as.split(tensor)
        held |= {name.removesuffix(WEIGHT) + part: value for part, value in parts.items()}
    assert any(name.endswith(SCALE) for name in held)
    return held


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """Makes a job for each format. A hidden axis of 72 has a short last block, which NF4 cannot have."""
    prune = {"ratio": 0.3, "prune_every": 2}
    of_formats: dict[str, Job] = {}
    for frozen, hidden in (("int8", 72), ("nf4", 128)):
        folder = tmp_path_factory.mktemp(frozen)
        sizes = SIZES | {"dtype": "bfloat16", "hidden": hidden}
        of_formats[frozen] = tiny_job(
            folder, prune, steps=STEPS, model=sizes, dtype="bfloat16", frozen=frozen
        )
    return of_formats


# test_so_do_other_settings has two
@pytest.mark.parametrize("world_size", [heavy(1), 3])
@pytest.mark.parametrize("frozen", ["int8", "nf4"])
def test_it_trains_and_cuts_as_the_weights_it_means(
    ranks: RankPool, jobs: dict[str, Job], tmp_path: Path, frozen: str, world_size: int
) -> None:
    train_as_meant(ranks, world_size, jobs[frozen], tmp_path)


def train_as_meant(ranks: RankPool, world_size: int, job: Job, tmp_path: Path) -> dict[str, Tensor]:
    """Trains with quantised weights and with those they stand for. Returns what a resumed run would read of the source.

    ZeRO-3 scores a transposed weight in another order. A process that has it whole does not.
    """
    meant = write_dequantised(job, tmp_path / "meant")
    found, expected = (
        ranks.run(world_size, train, x)[0] for x in (job, replace(job, folder=meant, frozen=None))
    )
    reads_weights = job.prune.get("criterion") != "fisher"
    reorders = job.deepspeed is not None and reads_weights
    assert_same_outcome(found, expected, rtol=1e-5 if reorders else 0.0)
    left = read_left(job, found)
    assert_equal_tensors(left, found.frozen)
    if job.deepspeed is not None:
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
    prune = OPEN | {"ratio": 0.3, "prune_every": 2}
    experts, _ = family_job(
        tmp_path, family, prune, steps=STEPS, model=sizes, dtype="bfloat16", frozen="int8"
    )
    left = train_as_meant(ranks, world_size, experts, tmp_path)
    # each has a stack into the channels of its experts, and one out of them
    mixtures = sum(x.get("experts", 0) > 0 for x in open_pretrained(experts.folder).shape.counts)
    stacks = sum(".experts." in n and x.dtype == torch.int8 for n, x in left.items())
    assert stacks == 2 * mixtures > 0


CHECKPOINTING = {"gradient_checkpointing": True, "micro_batch_size": 1, "criterion": "lora"}
OFFLOAD = {"criterion": "fisher", "deepspeed": "ds_configs/zero3_offload.json"}
MAGNITUDE = {"criterion": "magnitude", "ranking": "global", "normalize": "none", "dtype": "float32"}


@pytest.mark.parametrize(
    ("frozen", "world_size", "changes"),
    [
        ("int8", 2, CHECKPOINTING),
        ("int8", 2, OFFLOAD),
        heavy("int8", 2, MAGNITUDE),
        heavy("int8", 2, {"criterion": "fisher", "normalize": "none", "lora_dropout": 0.1}),
        ("int8", 1, {"deepspeed": None}),
        heavy("nf4", 2, CHECKPOINTING),
        heavy("nf4", 2, OFFLOAD),
        ("nf4", 2, MAGNITUDE),
        ("nf4", 1, {"deepspeed": None}),
    ],
    ids=str,
)
def test_so_do_other_settings(
    ranks: RankPool,
    jobs: dict[str, Job],
    tmp_path: Path,
    frozen: str,
    world_size: int,
    changes: dict[str, Any],
) -> None:
    job = jobs[frozen]
    of_job = {key: changes[key] for key in changes.keys() & {field.name for field in fields(Job)}}
    prune = job.prune | {key: changes[key] for key in changes.keys() - of_job.keys()}
    changed = replace(job, prune=prune, **of_job)
    train_as_meant(ranks, world_size, changed, tmp_path)


@pytest.mark.parametrize("frozen", [heavy("int8"), "nf4"])
def test_a_refit_is_quantised_by_the_owner_of_the_layer(
    ranks: RankPool, jobs: dict[str, Job], tmp_path: Path, frozen: str
) -> None:
    """Other linears than those that it rewrites keep their bits. Those are int8 beside NF4."""
    job = jobs[frozen]
    refits = OPEN | {"warmup_fraction": 0.5, "compensate": "least_squares"}
    refit = replace(job, prune=job.prune | refits)
    meant = write_dequantised(refit, tmp_path / "meant")
    found, dense = (
        ranks.run(3, refit_once, x)[0] for x in (refit, replace(refit, folder=meant, frozen=None))
    )
    expected = requantised(refit, dense)
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


def test_a_weight_that_is_not_finite_is_named_on_every_rank(
    jobs: dict[str, Job], tmp_path: Path
) -> None:
    job = jobs["int8"]
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
