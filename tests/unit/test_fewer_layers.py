"""Drops whole layers, of every family: in memory and saved it equals a model whose dropped layers do nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BitsAndBytesConfig

from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.pretrained.fewer_layers import drop_layers
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.families import SIZES, TINY, tiny_model
from tests.support.family_cuts import difference, logits, reopened
from tests.support.refusals import must_name

# one of each sort. The tolerance and its reason are those of test_family_proof.py
DROPPED, TOLERANCE = (1, 4), 1e-5
DROPS = [family for family in FAMILIES if FAMILIES[family].keeps_layers is None]
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
    model, in_memory = (tiny_model(family, **deep(family)) for _ in range(2))
    layers, before = shape_from_config(model.config.to_dict(), family).layers, logits(model)
    drop_layers(in_memory, (*DROPPED, DROPPED[0]))
    for i in DROPPED:
        decoder_layers(model)[i].forward = lambda hidden_states, *_, **__: hidden_states
    expected = logits(model)
    assert difference(expected, before) > 0.1
    assert difference(logits(in_memory), expected) < TOLERANCE
    in_memory.save_pretrained(tmp_path)
    left = open_pretrained(tmp_path)
    assert left.shape.layers == tuple(x for i, x in enumerate(layers) if i not in DROPPED)
    assert difference(logits(reopened(left)), expected) < TOLERANCE


@pytest.mark.parametrize("family", [family for family in TINY if family not in DROPS])
def test_a_family_that_needs_its_layers_says_so(family: str) -> None:
    must_name(f"drop_layers {family}", drop_layers, tiny_model(family), (1,))


def test_a_setting_that_does_not_change_keeps_its_object() -> None:
    """transformers reads a quantization_config as an object."""
    model = tiny_model("llama", **deep("llama"))
    quantization = BitsAndBytesConfig(load_in_4bit=True)
    model.config.quantization_config = quantization
    drop_layers(model, (1,))
    assert model.config.quantization_config is quantization


def test_a_model_in_memory_is_refused_unchanged() -> None:
    model = tiny_model("llama")
    must_name("drop_layers [0, 7]", drop_layers, model, (0, 7))
    assert len(decoder_layers(model)) == model.config.num_hidden_layers
    tower = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"text_config": {}}))
    must_name("drop_layers tower", drop_layers, tower, (1,))
