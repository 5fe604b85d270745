"""A multimodal model whose text part is cut, exported with its tower, is the masked original with an image.

Differences: as in test_family_proof.py.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, PreTrainedModel

from loraprune_ds.config import ModelConfig, PruneConfig
from loraprune_ds.config_types import Ranking
from loraprune_ds.files import read_json, write_json
from loraprune_ds.generate.models import find_model, load_model, open_result
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning, open_pretrained
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.text_part import PREFIXES, check_processor, check_tower
from loraprune_ds.pretrained.weight_files import copy_tensors
from loraprune_ds.pruning.goal import make_goal
from tests.support.families import tiny_config
from tests.support.family_cuts import (
    FEW,
    MANY,
    PROMPT,
    Network,
    cut_and_export,
    difference,
    draw,
    reopened,
    with_lora,
)
from tests.support.masking import MATTERS, TOLERANCE, mask
from tests.support.multimodal import inputs_with_image, load_whole, multimodal, save_gemma3
from tests.support.refusals import must_name
from tests.support.shapes_and_scores import make_shape

# Groups that stay. Gemma 3 wants heads that divide hidden_size. Qwen2.5-VL has no field for fewer heads.
KEPT = {"gemma3": FEW, "gemma4": FEW, "qwen2_5_vl": (5, 13), "qwen3_vl": MANY, "qwen3_vl_moe": FEW}
KEPT |= {"qwen3_5": MANY, "qwen3_5_moe": FEW, "muse_glimmer": FEW}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
pytestmark = pytest.mark.usefixtures("fresh_transformers")


@pytest.fixture(scope="module", params=KEPT)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, PreTrainedModel, Path]:
    """Returns a multimodal model and its folder, with settings of a processor and layers for further tokens."""
    folder = tmp_path_factory.mktemp("whole")
    model = multimodal(request.param)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | {"mtp.fc.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "preprocessor_config.json", {"image_processor_type": "any"})
    return request.param, model, folder


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits


def untrained(pretrained: PretrainedModel) -> Network:
    """Puts LoRA around the text part that changes nothing."""
    network = with_lora(reopened(pretrained), pretrained.config, "source")
    for name, factor in network.model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(factor)
    return network


def test_the_export_is_the_masked_model_with_an_image(
    made: tuple[str, Any, Path], tmp_path: Path
) -> None:
    name, whole, folder = made
    whole.double()  # in fp32 some CPUs round beyond the tolerance
    pretrained, inputs = open_pretrained(folder), inputs_with_image(name)
    before = logits(whole, inputs)
    assert (
        difference(
            logits(whole, inputs | {"pixel_values": inputs["pixel_values"].flip(-1)}), before
        )
        > 1e-3
    )
    network = untrained(pretrained)
    dense, counts = network.shape, [KEPT[name]] * len(network.shape.counts)
    export = cut_and_export(network, tmp_path / "model", *counts, source=pretrained)
    check_tower(read_json(folder / "config.json"), export.shape, name)
    loaded = load_whole(export.folder, dtype=torch.float64, **EAGER)
    assert type(loaded) is type(whole)
    decoder = whole.get_decoder()
    stack_experts(decoder)
    lm = SimpleNamespace(
        model=decoder, config=decoder.config, get_submodule=lambda _: decoder.layers
    )
    mask(cast(Any, SimpleNamespace(model=lm, shape=dense)), draw(dense, *counts))
    expected = logits(whole, inputs)
    assert difference(logits(loaded.eval(), inputs), expected) < TOLERANCE
    assert difference(expected, before) > MATTERS
    assert (export.folder / "preprocessor_config.json").is_file()
    text = read_json(export.folder / "config.json")["text_config"]
    assert text.get("mtp_num_hidden_layers", 0) == 0
    again = open_result(export.folder)
    assert again.pretrained.shape.counts == export.shape.counts
    assert difference(logits(again.load_model(**EAGER).double(), inputs), expected) < TOLERANCE
    evaluated = load_model(find_model(str(export.folder)), "float32", torch.device("cpu"))
    assert difference(logits(evaluated, {"input_ids": PROMPT}), export.logits) < TOLERANCE


@pytest.mark.parametrize(
    ("given", "tower", "found"),
    [(None, True, "uniform"), (None, False, "global"), ("global", True, "global")],
)
def test_a_tower_decides_on_a_ranking_that_is_not_given(
    given: Ranking | None, tower: bool, found: str
) -> None:
    shape = make_shape([(4, 128)] * 3)
    assert make_goal(PruneConfig(ranking=given), shape, tower=tower).config.ranking == found


def test_gemma_4_has_equal_layers_without_its_tower_too() -> None:
    shape = shape_from_config(tiny_config("gemma4_text").to_dict(), "somewhere")
    equal = PruneConfig(ratio=0.2, channel_multiple=1, protected_first=0, protected_last=0)
    assert make_goal(equal, shape).config.ranking == "uniform"
    for unequal in (replace(equal, ranking="global"), replace(equal, protected_last=1)):
        must_name("gemma4_text prune.ranking", make_goal, unequal, shape)
    must_name("prune.head_ratio 0.1 gemma4_text", make_goal, replace(equal, head_ratio=0.1), shape)


def test_what_a_stock_class_cannot_hold_is_refused(
    made: tuple[str, Any, Path], tmp_path: Path
) -> None:
    name, _, folder = made
    config, shape = read_json(folder / "config.json"), open_pretrained(folder).shape
    same = [KEPT[name]] * len(shape.layers)
    for pruned in (None, shape.resized(draw_layers(shape, *same[1:], (5, 20)))):
        must_name(
            "somewhere prune.ranking model.text_only", check_tower, config, pruned, "somewhere"
        )
    unknown = config | {"vision_config": 3}
    must_name("somewhere config.json", check_tower, unknown, shape, "somewhere")
    counts, names = {
        "qwen2_5_vl": (FEW, "model.layers.0.self_attn prune.head_ratio"),
        "gemma3": (MANY, "8 prune.tensor_parallel prune.head_ratio model.text_only"),
    }.get(name, (None, ""))
    if counts:
        fewer = shape.resized(draw_layers(shape, counts, counts))
        must_name(f"somewhere {names}", check_tower, config, fewer, "somewhere")
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("preprocessor*"))
    check_processor(folder)
    must_name("bare preprocessor_config.json model.text_only", check_processor, bare)
    assert open_for_pruning(folder, ModelConfig(text_only=True)).tower is None


def draw_layers(shape: Any, *counts: tuple[int, int]) -> Any:
    return tuple(keep.counts for keep in draw(shape, *counts))


def test_the_first_qwen2_5_vl_has_its_text_outside(tmp_path: Path) -> None:
    """Its fields lie beside those of the whole model, and the tower's tensors beside the decoder's."""
    model = multimodal("qwen2_5_vl")
    model.save_pretrained(tmp_path / "new")
    new = read_json(tmp_path / "new" / "config.json")
    text = new.pop("text_config")
    old = {key: value for key, value in text.items() if key != "model_type"} | new
    write_json(tmp_path / "config.json", old)
    # transformers saves the first layout
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    pretrained = open_pretrained(tmp_path)
    assert pretrained.tower is not None
    assert pretrained.tower.prefixes == PREFIXES[-1]
    assert all(name.startswith("visual.") for name in pretrained.tower.files)
    counts = [KEPT["qwen2_5_vl"]] * len(pretrained.shape.counts)
    export = cut_and_export(untrained(pretrained), tmp_path / "model", *counts, source=pretrained)
    load_whole(export.folder)


def test_the_processor_comes_along(tmp_path: Path) -> None:
    """It makes the same inputs of a picture as the source's, which the export reads."""
    save_gemma3(tmp_path / "whole")
    pretrained = open_pretrained(tmp_path / "whole")
    check_processor(pretrained.folder)
    counts = [KEPT["gemma3"]] * len(pretrained.shape.counts)
    export = cut_and_export(untrained(pretrained), tmp_path / "model", *counts, source=pretrained)
    picture = Image.fromarray(torch.arange(1200, dtype=torch.uint8).view(20, 20, 3).numpy())
    processors = (
        AutoProcessor.from_pretrained(folder) for folder in (tmp_path / "whole", export.folder)
    )
    before, after = (
        dict(one(text="x an image", images=[picture], return_tensors="pt")) for one in processors
    )
    assert before.keys() == after.keys() >= {"input_ids", "pixel_values"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    model = open_result(export.folder).load_model()
    other = after | {"pixel_values": -after["pixel_values"]}
    assert difference(logits(model, after), logits(model, other)) > 1e-3


def test_tensors_are_copied_byte_by_byte(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.arange(7),
        "c": torch.tensor(True),
        "d": torch.randn(1),
    }
    for i, part in enumerate((("b", "a", "d"), ("c",))):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{i}.safetensors")
    files = {
        "c": tmp_path / "1.safetensors",
        "b": tmp_path / "0.safetensors",
        "a": tmp_path / "0.safetensors",
    }
    copy_tensors(files, tmp_path / "copy.safetensors")
    found = load_file(tmp_path / "copy.safetensors")
    assert found.keys() == files.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in found)
