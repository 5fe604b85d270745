"""A model that FSDP2 shards by rows over gloo ranks, against the same training in one process, over two cuts.

Both compute in fp32 and add the same numbers in another order: a loss is a mean over the ranks, a score a sum over the
rows of each rank, a norm a root of a sum over the ranks. So losses agree within four units of fp32's last place, and
norms, of gradients behind refits that multiply rounding, within eighty. A score is a square of gradients, which
may cancel. Adam's epsilon keeps LoRA as close as losses.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracle.models import make_tiny_llama
from tests.support import fsdp_training
from tests.support.families import heavy, tiny_model
from tests.support.fsdp_training import REFIT, Result, Training, train
from tests.support.ranks import RankPool
from tests.support.resuming import read_tensors

LOSS, NORM, SCORE = 5e-7, 1e-5, 1e-4
LORA: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
# A refit solves for new weights, which multiplies rounding by the condition of its inputs.
EXPORT: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
FISHER: dict[str, Any] = {"criterion": "fisher"}
MAGNITUDE: dict[str, Any] = {"criterion": "magnitude"}
FISHER_REFIT = FISHER | REFIT
SHARED: dict[str, Any] = {"mesh": (2,)}
ON_FOUR: dict[str, Any] = {"mesh": (4,)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models: odd sizes, so that ranks have other numbers of rows, and one of each peculiarity."""
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"heads": 10, "kv_heads": 5, "head_dim": 6, "hidden": 50, "ffn": 61}
    make_tiny_llama(root / "llama", layers=3, **sizes)
    make_tiny_llama(root / "tied", layers=2, tie=True, biases=True, **{**sizes, "hidden": 60})
    make_tiny_llama(root / "query heads", layers=2, **{**sizes, "kv_heads": 2})
    for family in ("gemma2", "qwen2", "t5", "deepseek_v3"):
        tiny_model(family, seed=1).save_pretrained(root / family)
    return {path.name: path for path in root.iterdir()}


def compare(ours: Result, alone: Result) -> None:
    cuts = sum(before != after for before, after in pairwise(alone.kept))
    assert cuts >= 2
    assert ours.kept == alone.kept
    assert ours.losses == pytest.approx(alone.losses, rel=LOSS)
    assert ours.norms == pytest.approx(alone.norms, rel=NORM)
    for found, wanted in zip(ours.scores, alone.scores, strict=True):
        assert ((found - wanted).abs() <= SCORE * size(wanted)).all()
    torch.testing.assert_close(ours.tensors, alone.tensors, **LORA)


def size(scores: Tensor) -> Tensor:
    """Returns the size of each score. A product of two query heads may cancel, so its size is that of both heads."""
    if scores.ndim == 1:
        return scores.abs()
    heads = scores.diagonal(dim1=-2, dim2=-1).sqrt()
    return heads[..., :, None] * heads[..., None, :]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llama", SHARED | {"prune": REFIT, "evaluates": True}),
        ("llama", SHARED | {"prune": FISHER, "reshard": False, "parts": 2, "r": 1, "checkpointing": "not reentrant"}),
        ("tied", {"prune": REFIT | {"normalize": "none"}, "mesh": (2, 1), "checkpointing": "wrapper"}),
        ("t5", SHARED | {"prune": FISHER_REFIT, "offload": True}),
        ("deepseek_v3", SHARED | {"prune": FISHER}),
        heavy("deepseek_v3", SHARED | {"prune": {"head_ratio": 0.2}, "offload": True}),
        ("llama", SHARED | {"prune": {}, "scale": 1024.0, "steps": 5}),
        heavy("llama", SHARED | {"prune": FISHER}),
        heavy("llama", SHARED | {"prune": MAGNITUDE | REFIT}),
        heavy("llama", SHARED | {"prune": REFIT, "r": 1}),
        heavy("llama", SHARED | {"prune": FISHER_REFIT, "reshard": False, "evaluates": True}),
        heavy("llama", SHARED | {"prune": REFIT, "prefetches": True, "checkpointing": "reentrant"}),
        heavy("llama", SHARED | {"prune": FISHER_REFIT, "offload": True, "parts": 3}),
        heavy("query heads", SHARED | {"prune": FISHER_REFIT}),
        heavy("query heads", {"prune": REFIT, "mesh": (2, 2), "r": 2}),
        heavy("gemma2", {"prune": REFIT, "mesh": (3,)}),
        heavy("qwen2", SHARED | {"prune": FISHER_REFIT}),
        heavy("t5", {"prune": REFIT, "mesh": (2, 2)}),
        heavy("llama", {"prune": REFIT, "mesh": (2, 2), "evaluates": True}),
        heavy("llama", {"prune": FISHER, "mesh": (2, 2), "parts": 3, "r": 1}),
        heavy("llama", ON_FOUR | {"prune": REFIT, "r": 2}),
        heavy("llama", ON_FOUR | {"prune": FISHER_REFIT, "reshard": 2, "checkpointing": "wrapper"}),
        heavy("tied", ON_FOUR | {"prune": MAGNITUDE, "offload": True, "prefetches": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else describe(value),
)  # fmt: skip
def test_rows_of_ranks_are_scored_and_cut_as_one_process_cuts_them(
    ranks: RankPool, folders: dict[str, Path], tmp_path: Path, model: str, settings: dict[str, Any]
) -> None:
    training = Training(folders[model], **settings)
    plain = replace(training, mesh=(), offload=False, evaluates=False, scale=0.0)
    world_size = 1
    for size in training.mesh:
        world_size *= size
    ours = ranks.run(world_size, train, training, tmp_path / "ours")[0]
    compare(ours, train(plain, tmp_path / "alone"))
    exports = [read_tensors(tmp_path / name) for name in ("ours", "alone")]
    torch.testing.assert_close(*exports, **EXPORT)


def describe(settings: dict[str, Any]) -> str:
    """Returns the values of a case, for its name."""
    values = {**settings, **settings["prune"]}
    del values["prune"]
    return " ".join(f"{key}={value}" for key, value in values.items())


def test_a_refit_ends_the_passes_that_it_stops(ranks: RankPool, folders: dict[str, Path]) -> None:
    """Otherwise the next forward pass would not wait for the new weights."""
    training = Training(folders["llama"], prune=REFIT, mesh=(1,))
    assert ranks.run(1, fsdp_training.has_open_forward_after_a_refit, training) == [False]


@pytest.mark.parametrize("policy", [None, heavy(torch.float32), heavy(torch.bfloat16)])
def test_a_half_base_is_cut_as_under_ddp(
    ranks: RankPool, folders: dict[str, Path], policy: torch.dtype | None
) -> None:
    """Both average over the same ranks. FSDP2 gathers LoRA in fp32, or in bf16 where its policy computes in that."""
    training = Training(folders["llama"], FISHER_REFIT, (2,), half=True, policy=policy)
    ours = ranks.run(2, train, training)[0]
    if policy is not None:  # the products of LoRA are rounded, so only the sizes are as wanted
        assert sum(map(len, ours.kept[-1])) < sum(map(len, ours.kept[0]))
        return
    ddp = ranks.run(2, train, replace(training, mesh=()))[0]
    assert (
        ours.kept[:4] == ddp.kept[:4]
    )  # the first cut. A later one may meet two scores that round alike
    assert ours.kept[3] != ours.kept[0]
    # A sum in another order may round to a neighbour in bf16, 0.4 % away. Few of a loss's terms do.
    assert ours.losses == pytest.approx(ddp.losses, rel=1e-3)
    assert ours.norms == pytest.approx(ddp.norms, rel=1e-2)


def test_a_cut_frees_all_that_it_replaces_and_every_parameter_stays_the_same_object(
    ranks: RankPool, folders: dict[str, Path]
) -> None:
    training = Training(folders["llama"], REFIT, (2,), evaluates=True)
    for alive, cut in ranks.run(2, fsdp_training.what_a_cut_leaves, training):
        assert cut > 50
        assert alive == 0


def test_the_gather_after_a_cut_waits_for_the_cut_not_for_the_update(
    ranks: RankPool, folders: dict[str, Path]
) -> None:
    training = Training(folders["llama"], FISHER, (2,))
    assert ranks.run(2, fsdp_training.event_after_a_cut, training) == [None, None]


@pytest.mark.parametrize("owner", [0, 1])
def test_every_replica_gets_the_rows_that_one_rank_has(ranks: RankPool, owner: int) -> None:
    assert ranks.run(2, fsdp_training.overwritten_by, owner) == [[0.0, 1.0, 2.0]] * 2


def test_gradients_that_are_averaged_in_half_precision_are_warned_of_on_one_rank(
    ranks: RankPool, folders: dict[str, Path]
) -> None:
    training = Training(folders["llama"], FISHER, (2,), half=True, policy=torch.bfloat16)
    first, second = ranks.run(2, fsdp_training.warnings_of, training)
    assert len(first) == 1
    assert "bfloat16" in first[0]
    assert "reduce_dtype" in first[0]
    assert second == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fsdp_training.fsdp1, "FullyShardedDataParallel fully_shard"),
        (fsdp_training.in_a_layer_fsdp1, "FullyShardedDataParallel fully_shard"),
        (fsdp_training.by_columns, "Shard(dim=1) shard_placement_fn"),
        (fsdp_training.without_lora, "layers.1.mlp.up_proj.lora_B fully_shard"),
        (fsdp_training.without_a_weight, "layers.1.mlp.up_proj.base_layer.weight fully_shard"),
        (fsdp_training.over_some_ranks, "1 of 2 ranks"),
        (fsdp_training.with_half_lora, "bfloat16 autocast_adapter_dtype"),
        (fsdp_training.compiled, "layers.1 torch.compile"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_sharding_that_cannot_be_cut_is_one_line(
    ranks: RankPool, folders: dict[str, Path], change: Any, words: str
) -> None:
    for line in ranks.run(2, fsdp_training.refuse, Training(folders["qwen2"], FISHER), change):
        assert all(word in line for word in words.split()), line
        assert "\n" not in line


def test_a_torch_that_shards_one_dtype_alone_is_named(
    ranks: RankPool, folders: dict[str, Path]
) -> None:
    halves = Training(folders["qwen2"], FISHER, half=True)
    for line in ranks.run(2, fsdp_training.refuse_on_an_old_torch, halves):
        assert all(word in line for word in (torch.__version__, "one dtype", "float32"))
