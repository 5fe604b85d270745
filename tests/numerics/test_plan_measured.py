"""The plan against real ranks: storages and activations to the byte. And what scoring sends, to the byte."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loraprune_ds.model.adapters import LEAF_LAYER_HIDDEN
from loraprune_ds.model.family import FAMILIES
from tests.oracle.models import make_tiny_llama
from tests.support.families import EQUAL, TINY, families, tiny_model
from tests.support.plan_cases import (
    IN_GROUP,
    Case,
    held_in_one_process,
    run_beside_plan,
    run_with_second_copy,
    saved_activations,
)
from tests.support.ranks import RankPool

SIZES: dict[str, Any] = {"heads": 6, "kv_heads": 3, "hidden": 48, "ffn": 61, "biases": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("plan"), layers=3, dtype="bfloat16", **SIZES)


# limits that a tiny model meets
LIMITED, INT8 = {"deepspeed": "limited"}, {"deepspeed": "limited", "frozen": "int8"}


@pytest.mark.parametrize(
    ("model", "world_size", "options"),
    [
        ("llama", 1, {"distilled": True}),
        ("llama", 2, {"criterion": "fisher", "distilled": True}),
        ("llama", 2, LIMITED),
        ("llama", 3, LIMITED | {"checkpointing": True, "distilled": True}),
        ("llama", 3, {"compensate": "least_squares"}),
        ("wide", 2, {"checkpointing": True}),  # linears are gathered one by one
        ("llama", 1, INT8 | {"distilled": True}),
        ("phi3", 2, INT8 | {"checkpointing": True, "criterion": "fisher", "distilled": True}),
        ("mixtral", 3, INT8 | {"compensate": "least_squares", "head_ratio": 0.4}),
        ("t5", 2, INT8 | {"distilled": True, "compensate": "least_squares", "protected_first": 0}),
    ],
)
def test_ranks_hold_what_was_planned_and_send_scores(
    ranks: RankPool,
    folder: Path,
    tmp_path: Path,
    model: str,
    world_size: int,
    options: dict[str, Any],
) -> None:
    if model == "wide":
        hidden = LEAF_LAYER_HIDDEN + 8
        folder = make_tiny_llama(
            tmp_path / model, hidden=hidden, ffn=24, layers=3, dtype="bfloat16"
        )
    elif "frozen" in options:
        folder = save_tiny(tmp_path / model, model, 3)
    limited: dict[str, Any] = (
        {"deepspeed": limited_config(tmp_path)} if "deepspeed" in options else {}
    )
    for row in check_ranks(ranks, world_size, Case(folder, **options | limited)):
        for step in row["steps"] if model == "llama" else []:
            planned, counted = step["pruning"]["planned"], step["pruning"]["counted"]
            assert counted == planned, step["step"]


def test_with_hpz_gathers_of_copies_stay_in_a_node(
    ranks: RankPool, folder: Path, tmp_path: Path
) -> None:
    path, shipped = tmp_path / "hpz.json", Path("ds_configs/zero3_multinode_hpz.json").read_text()
    path.write_text(shipped.replace('hpz_partition_size": "auto"', 'hpz_partition_size": 2'))
    case = Case(folder, deepspeed=str(path), micro_batches=2, per_node=2, distilled=True)
    for row in ranks.run(4, run_with_second_copy, case):
        check_row(row, several=True)
        for step in row["steps"][1::2]:
            assert step[IN_GROUP] > step["weights"]


# In bf16 a CPU keeps the mean and deviation of a LayerNorm in bf16, a GPU and the meta device in fp32.
LAYER_NORM = ("olmo", "starcoder2", "nemotron", "jais2", "stablelm")
# Beside sinks, eager attention looks for the largest score of each of 10 heads and 16 tokens.
MAXIMA = {"gpt_oss": 8 * 10 * 16}
# Routers with groups keep their choice of 3 experts, and a mask of 23, of 16 tokens.
WITH_GROUPS = (
    "glm4_moe dots1 exaone_moe deepseek_v3 glm4_moe_lite glm_moe_dsa nemotron_h mistral4".split()
)
CHOICES: dict[str, int] = dict.fromkeys(WITH_GROUPS, 16 * (8 * 3 + 23))
# On a CPU sdpa keeps probabilities where values are narrower than keys, unlike on a GPU.
LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa", "mistral4")
AS_WIDE: dict[str, dict[str, Any]] = {name: {"v_head_dim": 12} for name in LATENT}


# Four norms and capped scores; convolutions; biases, no gate, LayerNorm; experts; these with latent attention; these
# with attention that stays.
@pytest.mark.parametrize(
    "family", families("gemma2", "lfm2", "starcoder2", "mixtral", "glm4_moe_lite", "gemma4_text")
)
def test_ranks_of_other_families_hold_what_was_planned(
    ranks: RankPool, tmp_path: Path, family: str
) -> None:
    folder, longer = (save_tiny(tmp_path / str(layers), family, layers) for layers in (3, 4))
    first = 0 if family in EQUAL else None
    # helium has no more
    case = Case(folder, deepspeed=limited_config(tmp_path), protected_first=first, ratio=0.15)
    check_ranks(ranks, 2, replace(case, checkpointing=family in ("qwen3", "phi3")))
    dtype = "float32" if family in LAYER_NORM else "bfloat16"
    three, four = (
        ranks.run(1, saved_activations, replace(case, folder=x, dtype=dtype))[0]
        for x in (folder, longer)
    )
    # Only floats are counted. The plan also has three indices of the experts' tokens.
    indices = 3 * 8 * 16 * TINY[family].get(getattr(FAMILIES[family], "chosen", ""), 0)
    indices += MAXIMA.get(family, 0) + CHOICES.get(family, 0)
    assert four["counted"] - three["counted"] == four["last_layer"] - indices


def save_tiny(folder: Path, family: str, layers: int) -> Path:
    lists: dict[str, Any] = {
        key: (value[:1] + value[1:] * (layers - 1))[:layers]
        for key, value in TINY[family].items()
        if isinstance(value, list)
    }
    lists |= {
        key: value[:layers]
        for key, value in TINY[family].items()
        if key == "hybrid_override_pattern"
    }
    model = tiny_model(
        family, dtype=torch.bfloat16, num_hidden_layers=layers, **(lists | AS_WIDE.get(family, {}))
    )
    model.save_pretrained(folder)
    return folder


def check_ranks(ranks: RankPool, world_size: int, case: Case) -> list[dict[str, Any]]:
    rows = ranks.run(world_size, run_beside_plan, case)
    for row in rows:
        check_row(row, several=world_size > 1)
    return rows


def check_row(row: dict[str, Any], *, several: bool) -> None:
    assert [state["at"] for state in row["states"]] == ["loaded", "after the cut"]
    for state in row["states"]:
        assert state["storages"] == state["planned_storages"]
    sent = row["states"][1]["sent"]
    assert sent["moved"] <= sent["counted"]
    for step in row["steps"]:
        for kind in ("second_copy", "lora_gradients"):
            assert step[kind]["counted"] == step[kind]["planned"], (step["step"], kind)
    assert (row["steps"][0]["weights"] > 0) == several


def limited_config(folder: Path) -> str:
    """Writes the shipped config with limits that such a small model meets."""
    text = Path("ds_configs/zero3.json").read_text()
    limits = '"stage3_max_live_parameters": 15000, "stage3_max_reuse_distance": 9000, "stage": 3'
    (folder / "limited.json").write_text(text.replace('"stage": 3', limits))
    return str(folder / "limited.json")


def test_the_formula_says_what_a_layer_keeps_with_dropout(
    ranks: RankPool, folder: Path, tmp_path: Path
) -> None:
    """Compares three layers with four. What lies outside the layers is the same."""
    longer = make_tiny_llama(tmp_path / "longer", layers=4, dtype="bfloat16", **SIZES)
    three, four = (
        ranks.run(1, saved_activations, Case(x, dropout=0.05))[0] for x in (folder, longer)
    )
    assert four["counted"] - three["counted"] == four["last_layer"]


def test_one_process_holds_and_keeps_what_was_planned(folder: Path, tmp_path: Path) -> None:
    case = Case(folder, deepspeed=None, distilled=True, dropout=0.05)
    planned, held = held_in_one_process(case)
    assert held == planned
    longer = make_tiny_llama(tmp_path / "longer", layers=4, dtype="bfloat16", **SIZES)
    three, four = (saved_activations(replace(case, folder=x)) for x in (folder, longer))
    assert four["counted"] - three["counted"] == four["last_layer"]
