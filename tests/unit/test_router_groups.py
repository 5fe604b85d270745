"""Routers of DeepSeek-V3 and GLM-4.5: groups of experts, a correction of their scores, and layers that are no part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.per_kind import LayerKeep
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.pruning.importance import LayerScores
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.ranking import best_first, rank_global, rank_uniform
from loraprune_ds.pruning.step import all_groups
from tests.families import tiny_model
from tests.family_cuts import dense, difference, find_router

GROUPS: dict[str, Any] = {"n_routed_experts": 24, "n_group": 4, "topk_group": 2}  # six experts each, 3 are chosen
TOLERANCE = 1e-5


def deep() -> ModelShape:
    return dense("deepseek_v3", num_hidden_layers=4, **GROUPS).shape


def test_a_group_keeps_enough_for_the_router() -> None:
    """It compares groups by their best two, and takes 3 experts of two groups."""
    config = PruneConfig(ratio=0.1, protected_first=0, protected_last=0)
    limits = make_limits(config, deep())
    assert [layer["experts"] for layer in limits.floor] == [0, 8, 8, 8]
    assert limits.multiples["experts"] == 4
    more = make_limits(config, dense("deepseek_v3", **GROUPS, num_experts_per_tok=7).shape)
    assert more.floor[1]["experts"] == 16  # four of each, as two hold 7


def test_the_best_of_each_range_come_first() -> None:
    scores = torch.tensor([1.0, 9.0, 5.0, 2.0, 2.0, 3.0])
    assert best_first(scores, 1).tolist() == [1, 2, 5, 3, 4, 0]
    assert best_first(scores, 2).tolist() == [1, 5, 2, 3, 0, 4]
    assert best_first(scores[:0], 2).tolist() == []


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_every_group_loses_as_many(ranking: Any) -> None:
    """All of the least experts are in the first group."""
    shape, generator = deep(), torch.Generator().manual_seed(1)
    config = PruneConfig(ratio=0.3, protected_first=0, protected_last=0, ranking=ranking)
    scores = [
        LayerScores((kind, torch.rand(n, generator=generator) + (torch.arange(n) >= 6)) for kind, n in layer.items())
        for layer in shape.layers
    ]
    limits = make_limits(config, shape)
    if ranking == "uniform":
        keep = rank_uniform(scores, shape, limits, 0.3, 0.3)
    else:
        keep = rank_global(scores, shape, limits, 0.3)
    assert not len(keep[0]["experts"])
    for layer_keep, layer in zip(keep[1:], scores[1:], strict=True):
        experts = layer_keep["experts"]
        assert 8 <= len(experts) < 24
        of_each = len(experts) // 4
        for group in range(4):
            best = layer["experts"][6 * group : 6 * group + 6].topk(of_each).indices + 6 * group
            assert set(best.tolist()) == set(experts[experts // 6 == group].tolist())


def test_a_cut_is_the_router_whose_other_experts_nobody_may_choose() -> None:
    cut, masked = (dense("deepseek_v3", **GROUPS) for _ in range(2))
    kept = torch.tensor([0, 2, 5, 6, 8, 9, 12, 13, 15, 19, 20, 23])
    whole = all_groups(cut.shape)
    cut.cut([whole[0], LayerKeep({**whole[1], "experts": kept})])
    gone = torch.ones(24, dtype=torch.bool).index_fill(0, kept, False)
    find_router(decoder_layers(masked.model)[1]).e_score_correction_bias.data[gone] = -torch.inf
    assert difference(cut.logits(), masked.logits()) < TOLERANCE
    assert difference(cut.logits(), dense("deepseek_v3", **GROUPS).logits()) > 100 * TOLERANCE


def test_the_correction_stays_fp32(tmp_path: Path) -> None:
    """Its values lie so close together that bf16 would choose other experts."""
    model = tiny_model("glm4_moe")
    model.save_pretrained(tmp_path)
    pretrained = open_pretrained(tmp_path)
    name = f"model.layers.1.mlp.gate.{CORRECTION}"
    for found in pretrained.read_held(name, 0, 23, torch.bfloat16), pretrained.read_whole(name, torch.bfloat16):
        assert torch.equal(found, model.get_buffer(name))
    held = pretrained.shape.held(None, 2)
    assert [x for x, tensor in held.items() if tensor.element_size == 4] == [name]


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """DeepSeek and GLM publish them behind the last layer. transformers does not load them either."""
    tiny_model("glm4_moe", num_nextn_predict_layers=1).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    assert open_pretrained(tmp_path).shape.layers[1]["experts"] == 23
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.3\.eh_proj\.weight has no place"):
        open_pretrained(tmp_path)
