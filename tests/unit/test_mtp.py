"""The layers that predict further tokens, kept by an export: stock layers that compute what the masked ones do.

transformers has no class of the whole head. Here its decoder layers are those of a causal LM without any others, which
transformers loads. Differences: as in test_family_proof.py.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loraprune_ds.export import formats
from loraprune_ds.export.contents import find_contents
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.model.groups import QUERY_HEADS, LayerKeep
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.weight_files import INDEX_FILE
from tests.support.families import SIZES, tiny_model
from tests.support.family_cuts import (
    FEW,
    MANY,
    cut_and_export,
    difference,
    load,
    logits,
    reopened,
    with_lora,
)
from tests.support.masking import MATTERS, TOLERANCE, mask
from tests.support.mtp_heads import HEADS, OTHERS, add_head, as_head
from tests.support.multimodal import load_whole, multimodal
from tests.support.refusals import edit, must_name
from tests.support.resuming import read_tensors

FIELD = "mtp_num_hidden_layers"
ONE: dict[str, Any] = {FIELD: 1}
NEXT = "qwen3_next"  # is published without the field
# A family or a multimodal type, how many layers there are, whether all experts are one tensor as published, and the
# key-value heads. Of 2 only query heads leave.
CASES = [
    ("qwen3_5_text", 2, False, 5),
    ("qwen3_5_moe_text", 1, True, 5),
    (NEXT, 1, False, 5),
    ("qwen3_5", 1, False, 5),
]
CASES += [("qwen3_5_text", 1, False, 2)]


def cut(folder: Path, out: Path, *counts: tuple[int, int]) -> Path:
    pretrained = open_pretrained(folder)
    network = with_lora(reopened(pretrained), pretrained.config, "source")
    return cut_and_export(network, out, *counts, source=pretrained).folder


def export(pruned: Path, source: Path, out: Path, name: str = "hf") -> list[str]:
    return formats.export(find_contents(pruned), name, out, source)


def largest(layer: nn.Module, heads: int, others: int, ranges: int) -> LayerKeep:
    """Chooses by squares of weights, in each range of query heads. Written without the package's specs."""
    weights = dict(layer.named_parameters())

    def squares(name: str, groups: int, axis: int) -> Tensor:
        return weights[name].double().movedim(axis, 0).reshape(groups, -1).square().sum(1)

    axes = {"q": 0, "o": 1} if ranges > 1 else {"q": 0, "k": 0, "v": 0, "o": 1}
    attention = [
        squares(f"self_attn.{x}_proj.weight", ranges * HEADS, axis) for x, axis in axes.items()
    ]
    experts = "mlp.experts.down_proj" in weights
    mlp = [("experts.gate_up_proj", 0), ("experts.down_proj", 0)] if experts else []
    mlp = mlp or [("gate_proj.weight", 0), ("up_proj.weight", 0), ("down_proj.weight", 1)]
    channels = [squares(f"mlp.{name}", SIZES["intermediate_size"], axis) for name, axis in mlp]
    best = sum(attention, torch.zeros(())).view(ranges, HEADS).topk(heads).indices
    chosen = (
        (best + HEADS * torch.arange(ranges)[:, None]).flatten(),
        sum(channels, torch.zeros(())).topk(others).indices,
    )
    kinds = QUERY_HEADS if ranges > 1 else "heads", "experts" if experts else "channels"
    return LayerKeep(zip(kinds, (x.sort().values for x in chosen), strict=True))


@pytest.mark.parametrize(("name", "count", "fused", "keys"), CASES)
def test_a_kept_head_is_the_masked_one(
    name: str, count: int, fused: bool, keys: int, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    field: dict[str, Any] = {} if name == NEXT else {FIELD: count}
    whole = (
        multimodal(name)
        if name == "qwen3_5"
        else tiny_model(name, **field, num_key_value_heads=keys)
    )
    whole.save_pretrained(source)
    head = add_head(source, count, fused=fused)
    pruned = cut(source, tmp_path / "pruned", FEW, FEW)
    (note,) = export(pruned, source, out)
    assert "not tuned" in note

    before, given, found = read_tensors(pruned), read_tensors(source), read_tensors(out)
    assert all(torch.equal(found[x], tensor) for x, tensor in before.items())
    assert all(torch.equal(found[f"mtp.{x}.weight"], given[f"mtp.{x}.weight"]) for x in OTHERS)
    # as in the source
    assert {x.dtype for name, x in found.items() if name not in before} == {torch.bfloat16}
    index = read_json(out / INDEX_FILE)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(
        x.numel() * x.element_size() for x in found.values()
    )
    config = read_json(out / "config.json")
    assert config.get("text_config", config).get(FIELD) == (None if name == NEXT else count)
    load_whole(out, *(() if name == "qwen3_5" else [type(whole)]))

    # The layers as the stock class of the exported config takes them
    text = open_pretrained(out).config
    assert (text["num_key_value_heads"], text["num_attention_heads"]) == (min(keys, 3), 6)
    alone = tmp_path / "alone"
    alone.mkdir()
    write_json(alone / "config.json", as_head(text, count))
    tensors = {
        f"model.{x.removeprefix('mtp.')}": tensor
        for x, tensor in found.items()
        if x.startswith("mtp.layers")
    }
    tensors |= {x: p.detach() for x, p in head.named_parameters() if "layers" not in x}
    save_file(tensors, alone / "model.safetensors", metadata={"format": "pt"})
    load_whole(alone, type(head))
    whole_logits = logits(head.double())
    shape = shape_from_config(json.loads(head.config.to_json_string(use_diff=False)), name)
    keep = [largest(layer, *FEW, 2 if keys == 2 else 1) for layer in decoder_layers(head)]
    stack_experts(head)
    mask(cast(Any, SimpleNamespace(model=head, shape=shape)), keep)
    expected = logits(head)
    assert difference(logits(load(alone).double()), expected) < TOLERANCE
    assert difference(whole_logits, expected) > MATTERS


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    source, bare, kept, out = (tmp_path / name for name in ("source", "bare", "kept", "out"))
    tiny_model("qwen3_5_text", **ONE).save_pretrained(bare)
    shutil.copytree(bare, source)
    add_head(source, 1)
    equal, unequal = (
        cut(source, tmp_path / "equal", FEW, FEW),
        cut(source, tmp_path / "unequal", FEW, MANY),
    )
    must_name("bare mtp", export, equal, bare, out)
    must_name("mtp prune.ranking", export, unequal, source, out)
    must_name("--mtp --format", export, equal, source, out, "gguf-f16")
    export(equal, source, kept)
    must_name("kept mtp", export, kept, source, out)
    others: dict[str, dict[str, Any]] = {
        "wider": {"head_dim": 16},
        "smaller": {"intermediate_size": 12},
    }
    for name, sizes in others.items():
        tiny_model("qwen3_5_text", **ONE, **sizes).save_pretrained(tmp_path / name)
        add_head(tmp_path / name, 1)
        must_name(name, export, equal, tmp_path / name, out)
    edit("config.json", **{FIELD: 2})(source)
    must_name("source mtp.layers.1.self_attn.q_proj.weight", export, equal, source, out)
    assert not out.exists()
