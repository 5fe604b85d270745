"""Checks that the planner takes the modules of every family from the model itself."""

import pytest

from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.plan.passes import Network
from tests.families import MIXED, tiny_config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_meets_every_parameter_of_every_layer(family: str) -> None:
    deep = {"num_hidden_layers": 5} if family in MIXED else {}  # only the first ones of each kind are traced
    source = tiny_config(family, **deep).to_dict()
    network = Network(source, shape_from_config(source, family), lora_rank=2, element_size=2)
    visits = network.training_pass(checkpointing=True)
    for phase in ("forward", "backward"):
        met = {p.name for visit in visits if visit.phase == phase and visit.enters for p in visit.module.parameters}
        ends_before_it = phase == "backward" and "lm_head.weight" in network.parameters  # an embedding that is not tied
        assert met == set(network.parameters) - ({"model.embed_tokens.weight"} if ends_before_it else set()), phase
