"""Gives exports of every family to a stranger: a process that has transformers but not this package."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.model.family import FAMILIES
from tests.support.families import EQUAL, SIZES
from tests.support.family_cuts import FEW, MANY, PROMPT, SOURCE, Export, difference, export
from tests.support.stranger import LOOK, OTHER_TRANSFORMERS, ask_stranger

# of the logits' standard deviation: the same operations, possibly by other kernels
TOLERANCE = 1e-5
# transformers 4.57 computes with the two parameters of Apertus's activation in bfloat16
XIELU = 2**-7
COUNTS = {"layers": (FEW, MANY)}  # with other layers by our modelling file
if OTHER_TRANSFORMERS:  # else the others are stock classes, which test_family_proof.py loads
    COUNTS |= {"few": (FEW, FEW), "many": (MANY, MANY)}
# transformers 4.57 takes hidden_size / heads for their head_dim.
ALL_HEADS = ("qwen2_moe", "granitemoe", "granitemoehybrid")
WITH_AUTO_CLASS = [name for name, family in FAMILIES.items() if not family.lm_class()]

STRANGER = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

def is_known(folder):
    family = json.loads((Path(folder) / "config.json").read_text())["model_type"].removeprefix("pruned_")
    return family in CONFIG_MAPPING_NAMES

eager, tensors = {"attn_implementation": "eager"}, load_file(sys.argv[1])
for folder in sys.argv[2:]:
    tell(look(load(folder, **eager), folder, **tensors, **eager) if is_known(folder) else {}, folder)
"""


Found = dict[str, tuple[Export, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Exports all families here. One fresh process elsewhere reads them."""
    root = tmp_path_factory.mktemp("families")
    made = {}
    for family in WITH_AUTO_CLASS:
        for name, counts in COUNTS.items():
            counts = (FEW, FEW) if family in EQUAL else counts
            if OTHER_TRANSFORMERS and family in ALL_HEADS:
                counts = [(SIZES["num_key_value_heads"], experts) for _, experts in counts]
            made[f"{family}-{name}"] = export(family, root / f"{family}-{name}", *counts)
    save_file({"prompt": PROMPT, "source": SOURCE.contiguous()}, root / "prompt.safetensors")
    ask_stranger(
        LOOK + STRANGER,
        root / "prompt.safetensors",
        *(one.folder for one in made.values()),
        folder=root,
    )
    return {name: (one, load_file(f"{one.folder}.safetensors")) for name, one in made.items()}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("family", WITH_AUTO_CLASS)
def test_a_stranger_finds_the_same_network(family: str, name: str, exports: Found) -> None:
    made, found = exports[f"{family}-{name}"]
    if OTHER_TRANSFORMERS and not found:
        pytest.skip(f"this transformers has no {family}")
    tolerance = XIELU if OTHER_TRANSFORMERS and family == "apertus" else TOLERANCE
    assert difference(found["logits"], made.logits) < tolerance
    assert torch.equal(found["saved_again"], found["logits"])
    assert torch.equal(found["cached"], found["uncached"])
