"""Drops whole layers, of every family: on disk and in memory it equals a model whose dropped layers do nothing."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch

from loraprune_ds.config import ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.fewer_layers import drop_layers, droppable
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.plan import make_plan
from loraprune_ds.plan.request import build_request, changed
from loraprune_ds.pruning.limits import layers_to_drop
from loraprune_ds.pruning.schedule import plan_pruning
from loraprune_ds.pruning.target import resolve
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train.data.samples import SampleOrder, Samples
from loraprune_ds.train.depth import choose_layers
from tests.families import SIZES, TINY, tiny_config, tiny_model
from tests.family_cuts import difference, logits, reopened
from tests.published import sizes_of
from tests.refusals import must_name

DROPPED, TOLERANCE = (1, 4), 1e-5  # one of each sort. The tolerance and its reason are those of test_family_proof.py
DROPS = [family for family in FAMILIES if FAMILIES[family].keeps_layers is None]
SOURCE = sizes_of("llama", 512, 1376, 8, 8, num_key_value_heads=4, vocab_size=1000)
LLAMA = shape_from_config(SOURCE, "llama")
pytestmark = pytest.mark.usefixtures("fresh_transformers")


def deep(family: str) -> dict[str, Any]:
    """Returns the changes that repeat the layers of a tiny model three times."""
    fields = SIZES | TINY[family]
    count = fields["num_hidden_layers"]
    lists = {key: x * 3 for key, x in fields.items() if isinstance(x, list) and len(x) == count}
    pattern = {key: x * 3 for key, x in fields.items() if key == "hybrid_override_pattern"}
    return lists | pattern | {"num_hidden_layers": 3 * count}


@pytest.mark.parametrize("family", DROPS)
def test_dropped_layers_do_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, **deep(family))
    model.save_pretrained(tmp_path)
    left = open_pretrained(tmp_path, dropped=DROPPED)
    count = len(left.all_layers.layers)
    assert left.shape.layers == tuple(x for i, x in enumerate(left.all_layers.layers) if i not in DROPPED)
    exported = export_config(left.config, left.shape, "float32").config
    assert exported["num_hidden_layers"] == count - len(DROPPED)
    in_memory, before = tiny_model(family, **deep(family)), logits(model)
    drop_layers(in_memory, DROPPED)
    for i in DROPPED:
        decoder_layers(model)[i].forward = lambda hidden_states, *_, **__: hidden_states
    expected = logits(model)
    assert difference(expected, before) > 0.1
    assert difference(logits(reopened(left)), expected) < TOLERANCE
    assert difference(logits(in_memory), expected) < TOLERANCE
    in_memory.save_pretrained(tmp_path / "saved")
    assert open_pretrained(tmp_path / "saved").shape.layers == left.shape.layers


def test_a_layer_named_twice_and_a_head_that_is_the_embedding(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=False)
    model.config.tie_word_embeddings = True  # as many files say that have a head of their own
    model.save_pretrained(tmp_path)
    left = open_pretrained(tmp_path, dropped=(2, 2))
    assert left.all_layers == open_pretrained(tmp_path).shape
    assert left.shape.layers == left.all_layers.layers[:3]


def run(model: dict[str, Any], prune: dict[str, Any]) -> RunConfig:
    train = TrainConfig(steps=20, global_batch_size=8)
    return RunConfig("unused", model=ModelConfig(**model), prune=PruneConfig(**prune), train=train)


def shape_of(family: str) -> ModelShape:
    return shape_from_config(FAMILIES[family].explicit(tiny_config(family, **deep(family)).to_dict()), family)


@pytest.mark.parametrize(
    ("model", "prune", "names"),
    [
        ({"drop_layers": [0]}, {}, "model.drop_layers [0]"),
        ({"drop_layers": [8]}, {}, "model.drop_layers [8]"),
        ({"drop_layers": [7]}, {"protected_last": 1}, "model.drop_layers [7]"),
        ({}, {"depth_ratio": 0.01}, "prune.depth_ratio 0.01"),
        ({}, {"depth_ratio": 0.9}, "prune.depth_ratio 0.9"),
        ({"adapter": "somewhere"}, {"depth_ratio": 0.25}, "prune.depth_ratio 0.25 model.adapter"),
    ],
)
def test_layers_that_cannot_be_dropped_are_named(model: dict[str, Any], prune: dict[str, Any], names: str) -> None:
    must_name(names, layers_to_drop, run(model, prune), LLAMA, None)


@pytest.mark.parametrize("family", [family for family in TINY if family not in DROPS])
def test_a_family_that_needs_its_layers_says_so(family: str) -> None:
    must_name(f"prune.depth_ratio 0.5 {family}", layers_to_drop, run({}, {"depth_ratio": 0.5}), shape_of(family), None)


def test_a_model_in_memory_is_refused_unchanged() -> None:
    model = tiny_model("llama")
    must_name("drop_layers [0, 7]", drop_layers, model, (0, 7))
    must_name("drop_layers gpt_oss", drop_layers, tiny_model("gpt_oss"), (1,))
    assert len(decoder_layers(model)) == model.config.num_hidden_layers
    tower = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"text_config": {}}))
    must_name("drop_layers tower", drop_layers, tower, (1,))


def test_a_tower_feeds_the_first_layers_of_a_qwen3_vl() -> None:
    tower = {"model_type": "qwen3_vl", "vision_config": {"deepstack_visual_indexes": [5, 11, 17]}}
    assert droppable(LLAMA, "", tower) == range(3, 8)
    assert droppable(LLAMA, "", {"model_type": "llava"}) == droppable(LLAMA, "") == range(1, 8)


def test_a_ratio_counts_the_dropped_layers() -> None:
    config = run({}, {"depth_ratio": 0.25, "ratio": 0.5, "channel_multiple": 1})
    request = build_request("llama", SOURCE, LLAMA, config, Cluster(1, 2))
    assert layers_to_drop(config, LLAMA, None) == ([1, 2], [1, 2, 3, 4, 5, 6, 7])
    assert len(request.shape.layers) == 6
    assert request.pruning.target(0) == 0.25
    final = request.shape_at(request.pruning.steps)
    assert final.linear_numel() == pytest.approx(0.5 * LLAMA.linear_numel(), rel=0.04)  # heads are whole
    first, dense, *_ = make_plan(request).stages
    assert first.state["weights"] > dense.state["weights"]
    assert dense.state["teacher"] > dense.state["weights"]  # it has all layers, and no head of its own
    assert changed(request, train={"micro_batch_size": 1}).shape == request.shape
    below = PruneConfig(ratio=0.2)
    must_name("prune.ratio 0.2 25.0%", resolve, below, request.shape, LLAMA)
    must_name("prune.ratio 0.2 25.0%", resolve, replace(below, head_ratio=0.1), request.shape, LLAMA)
    smaller = resolve(PruneConfig(ratio=None, sizes=["0.3", "0.4"]), request.shape, LLAMA)[2]
    assert [size.budget.ratio for size in smaller] == [0.3, 0.4]
    sections = plan_pruning(PruneConfig(), request.pruning.limits, smaller, 1000).sections
    assert [section.recovery for section in sections] == [333, 1000]  # the sizes remove 5 and 10 %
    must_name("prune.sizes 0.25", resolve, PruneConfig(ratio=None, sizes=["0.25", "0.4"]), request.shape, LLAMA)
    count = LLAMA.total_numel() // 2
    *_, (size,) = resolve(PruneConfig(ratio=None, target=str(count)), request.shape, LLAMA)
    assert size.budget.ratio * LLAMA.linear_numel() == pytest.approx(count, rel=2e-3)  # the rest are norms


def test_a_layer_is_chosen_without_those_before_it() -> None:
    """Layer 1 only makes the states larger, so it turns nothing, and layer 2 little. Without it 2 turns more than 3."""
    model, lines = tiny_model("llama", num_hidden_layers=5), list[str]()
    acts = {
        1: lambda x: 50 * x,
        2: lambda x: x + 8 * x.roll(1, -1) / x.norm(dim=-1, keepdim=True),
        3: lambda x: x + 0.1 * x.roll(1, -1),
        4: lambda x: x + x.roll(1, -1),
    }
    for i, act in acts.items():
        decoder_layers(model)[i].forward = lambda hidden_states, act=act, **_: act(hidden_states)
    samples = Samples.of_windows(torch.arange(3, 67).view(8, 8).int())
    dense = SimpleNamespace(shape=shape_from_config(model.config.to_dict(), "llama"), tower=None)
    prepared = SimpleNamespace(samples=samples, order=SampleOrder(8, 8, 0), dense=dense)
    context = SimpleNamespace(prepared=prepared, comm=Communicator(), recorder=SimpleNamespace(show=lines.append))
    context.config = run({}, {"depth_ratio": 0.4})
    assert choose_layers(cast(Any, context), model) == [1, 3]
    assert [line.split(",")[0] for line in lines] == ["drops layer 1", "drops layer 3"]
    of_others = torch.tensor([0.0, 1e3, 0.0, 0.0, 0.0])  # which layer 1 turns
    with patch.object(context.comm, "all_reduce", lambda sums: sums + of_others):
        assert choose_layers(cast(Any, context), model) == [2, 3]
