"""A Hugging Face folder is read in parts exactly, whole or cut, and refused in one line when anything is wrong."""

import itertools
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.config import ModelConfig
from loraprune_ds.pretrained import sources, weight_files, weights
from loraprune_ds.pretrained.build import build_for_losses
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.oracle.models import make_tiny_llama
from tests.support.families import LLAMA_LINEARS
from tests.support.refusals import Spoil, edit, edit_tensors, must_name, remove, truncate, write
from tests.support.shapes_and_scores import keep_of

SIZES: dict[str, Any] = {
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 6,
    "hidden": 48,
    "ffn": 37,
    "layers": 3,
}
WEIGHT, INDEX = "model.layers.1.mlp.up_proj.weight", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("intact"), **SIZES)


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """Makes a copy that a test may damage."""
    return Path(shutil.copytree(intact, tmp_path / "model"))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, folder / name, {"format": "pt"})


def split(folder: Path) -> None:
    """Makes two weight files and an index, as larger models have them."""
    tensors = tensors_of(folder)
    names = sorted(tensors)
    halves = {FIRST: names[::2], SECOND: names[1::2]}
    for file, members in halves.items():
        save(folder, {name: tensors[name] for name in members}, file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, names in halves.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


# Reading


@pytest.mark.parametrize("in_two", [False, True])
def test_read_flat_reads_a_slice(folder: Path, in_two: bool) -> None:
    types = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    expected = {
        name: tensor.to(types[i % 4]) for i, (name, tensor) in enumerate(tensors_of(folder).items())
    }
    save(folder, expected)
    if in_two:
        split(folder)
    opened, draw = open_pretrained(folder), random.Random(1)
    for _ in range(150):
        name = draw.choice(sorted(expected))
        numel = expected[name].numel()
        start, end = sorted((draw.randint(0, numel), draw.randint(0, numel)))
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
        shard = opened.weights.read_flat(name, start, end, dtype)
        assert shard.dtype == dtype
        assert torch.equal(shard, expected[name].reshape(-1)[start:end].to(dtype)), (
            name,
            start,
            end,
        )


def test_tensors_and_files_that_the_model_does_not_need_are_ignored(folder: Path) -> None:
    save(
        folder, tensors_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    )
    save(folder, {"base_model.model.x": torch.ones(2)}, "adapter_model.safetensors")
    assert (
        "model.layers.0.self_attn.rotary_emb.inv_freq" not in open_pretrained(folder).weights.files
    )


@pytest.mark.parametrize("difference", [0.0, 1e-3, None])
def test_a_head_that_config_json_calls_tied_is_tied_as_in_transformers(
    folder: Path, difference: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the values where both are stored, in the last chunk here. One alone, under either name, serves as both."""
    monkeypatch.setattr(weight_files, "READ_CHUNK", 7 * SIZES["hidden"])
    tensors, embedding, head = tensors_of(folder), "model.embed_tokens.weight", "lm_head.weight"
    tensors[head] = tensors[embedding].clone()
    tensors[head][-1, -1] += difference or 0.0
    if difference is None:
        del tensors[embedding]
    save(folder, tensors)
    edit("config.json", tie_word_embeddings=True)(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    tied = stock.lm_head.weight is stock.model.embed_tokens.weight
    assert tied != bool(difference)
    opened = open_pretrained(folder)
    assert (opened.shape.tie_word_embeddings, opened.config["tie_word_embeddings"]) == (tied, tied)
    assert opened.shape.total_numel() == sum(parameter.numel() for parameter in stock.parameters())
    for name in (embedding, *([] if tied else [head])):
        assert torch.equal(opened.weights.read_full(name, torch.float32), stock.state_dict()[name])


# Damage

SINGLE = "model.safetensors"
FIRST, SECOND, THIRD = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2, 3))
SURPLUS = "model.layers.3.mlp.up_proj.weight"


# What is damaged, and names in the line: of one file, and of two and their index.
OF_ONE: list[tuple[Spoil, str]] = [
    *((truncate(SINGLE, left), SINGLE) for left in (0, 3, 100, -1)),
    (lambda folder: (folder / SINGLE).write_bytes(random.Random(0).randbytes(5000)), SINGLE),
    (edit_tensors(lambda x: x.pop(WEIGHT)), WEIGHT),
    (edit("config.json", num_hidden_layers=1000), "model.layers.999. num_hidden_layers 1000"),
    (edit("config.json", attention_bias=True), "model.layers.0.self_attn.q_proj.bias"),
    (
        edit_tensors(lambda x: x.update({WEIGHT: x[WEIGHT].t().contiguous()})),
        f"{SINGLE} {WEIGHT} [48, 37] [37, 48]",
    ),
    (edit_tensors(lambda x: x.update({WEIGHT: x[WEIGHT].to(torch.int8)})), f"{SINGLE} {WEIGHT} I8"),
    (edit_tensors(lambda x: x.update({SURPLUS: torch.ones(48)})), f"{SINGLE} {SURPLUS}"),
    (
        lambda x: save(x, {WEIGHT: tensors_of(x)[WEIGHT]}, "more.safetensors"),
        f"more.safetensors {WEIGHT}",
    ),
    (lambda x: (x / SINGLE).rename(x / "model.bin"), "safetensors"),
    (lambda x: (x / SINGLE).rename(x / "adapter_model.safetensors"), "safetensors"),
    (remove("config.json"), "config.json"),
    (write("config.json", "[1, 2]"), "config.json"),
]
NO_MAPS = ("\udcff{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {}}')
OF_TWO: list[tuple[Spoil, str]] = [
    *((write(INDEX, text), INDEX) for text in NO_MAPS),
    (remove(SECOND), f"{SECOND} {INDEX}"),
    (truncate(FIRST, -1), FIRST),
    (lambda folder: shutil.copy(folder / SECOND, folder / THIRD), f"{THIRD} {INDEX}"),
]


@pytest.mark.parametrize(
    ("in_two", "damage", "names"),
    [*((False, *case) for case in OF_ONE), *((True, *case) for case in OF_TWO)],
)
def test_damage_is_named(folder: Path, in_two: bool, damage: Spoil, names: str) -> None:
    if in_two:
        split(folder)
    damage(folder)
    must_name(f"{folder} {names}", open_pretrained, folder)


def test_an_index_reaches_no_other_folder(folder: Path, tmp_path: Path) -> None:
    names = tensors_of(folder)
    (folder / SINGLE).rename(tmp_path / "x.safetensors")
    (folder / "within").mkdir()
    shutil.copy(tmp_path / "x.safetensors", folder / "within")
    for named in ("../x.safetensors", str(tmp_path / "x.safetensors"), "within/x.safetensors"):
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
        must_name(f"{INDEX} {named}", open_pretrained, folder)


# A cut model is read from the dense one's files as slices, bit by bit as if it had been written

Kept = list[tuple[list[int], list[int]]]  # heads and channels of every layer

HEAD_DIM, QUERIES_PER_GROUP = 6, 2
UNEVEN: Kept = [([0, 1, 2, 3], [*range(0, 37, 3)]), ([1, 3], [*range(37)]), ([2], [0, 36])]
EVEN: Kept = [([0, 2], [1, 2, 3, 30]), ([1, 2], [5, 6, 7, 8]), ([2, 3], [0, 1, 2, 36])]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("dense"), biases=request.param, **SIZES)


def cut_by_hand(tensors: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Returns the same tensors with rows and columns left out, one group after the other."""
    left = dict(tensors)
    for i, (heads, channels) in enumerate(kept):
        for linear in LLAMA_LINEARS:
            groups, width = (heads, HEAD_DIM) if linear.kind == "heads" else (channels, 1)
            width *= QUERIES_PER_GROUP if linear.queries else 1
            indices = [group * width + k for group in groups for k in range(width)]
            name = f"model.layers.{i}.{linear.name}"
            left[f"{name}.weight"] = left[f"{name}.weight"].index_select(
                linear.axis, torch.tensor(indices)
            )
            if linear.axis == 0 and f"{name}.bias" in left:
                left[f"{name}.bias"] = left[f"{name}.bias"][indices]
    return left


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
@pytest.mark.parametrize("kept", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_every_part_is_the_slice(
    source: Path, kept: Kept, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "READ_CHUNK", chunk)
    dense = open_pretrained(source)
    cut = dense.weights.cut(keep_of(kept))
    expected = cut_by_hand(tensors_of(source), kept)
    sizes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert cut.shape.parameters() == sizes
    built = build_for_losses(replace(dense, weights=cut), "sdpa")
    assert {name: tuple(p.shape) for name, p in built.named_parameters()} == sizes
    for name, tensor in expected.items():
        flat, numel = tensor.reshape(-1), tensor.numel()
        for start, end in itertools.pairwise(
            sorted([0, 0, 1, numel // 3, numel // 2, numel, numel])
        ):
            assert torch.equal(cut.read_flat(name, start, end, torch.float32), flat[start:end]), (
                name,
                start,
                end,
            )


def test_with_nothing_cut_it_is_the_model_on_disk(source: Path) -> None:
    dense = open_pretrained(source).weights
    assert dense.cut(keep_of([([0, 1, 2, 3], [*range(37)])] * 3)) is dense


def test_a_hub_model_is_downloaded_without_other_formats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repository, revision, "*.bin" in allow_patterns) == ("some/model", "main", False)
        assert {"*.safetensors", "tokenizer.model", "spiece.model"} <= set(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", download)
    assert sources.locate_model(ModelConfig("some/model", revision="main")) == tmp_path
