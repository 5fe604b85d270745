"""A Hugging Face folder is read in parts exactly, and refused in one line when anything about it is wrong."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.errors import UserError
from loraprune_ds.files import read_json
from loraprune_ds.model import pretrained
from loraprune_ds.model.pretrained import open_pretrained
from tests.oracle.models import make_tiny_llama

SIZES: dict[str, Any] = {
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 6,
    "hidden": 24,
    "ffn": 37,
    "layers": 3,
    "vocab": 59,
    "seed": 1,
}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("intact"), **SIZES)


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    """Makes a copy that a test may damage."""
    return Path(shutil.copytree(intact, tmp_path / "model"))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message.replace(f"{folder}/", "").replace(str(folder), "FOLDER")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, Tensor], name: str = "model.safetensors") -> None:
    save_file(tensors, folder / name, {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def split(folder: Path) -> Path:
    """Makes two weight files and an index, as larger models have them."""
    tensors = tensors_of(folder)
    names = sorted(tensors)
    weight_files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for weight_file, members in weight_files.items():
        save(folder, {name: tensors[name] for name in members}, weight_file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {name: weight_file for weight_file, names in weight_files.items() for name in names}})
    )
    return index


# Reading


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tie": True},
        {"biases": True},
        {"model_type": "mistral", "heads": 3, "kv_heads": 1},
    ],
    ids=str,
)
def test_names_and_shapes_are_those_of_the_stock_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = make_tiny_llama(tmp_path, **{**SIZES, **settings})
    stock = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if settings.get("tie"):
        del stock["lm_head.weight"]
    found = open_pretrained(folder)
    assert found.shape.parameters() == {name: tuple(tensor.shape) for name, tensor in stock.items()}
    assert set(found.files) == set(stock)


@pytest.mark.parametrize("in_two", [False, True])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 24])
def test_read_flat_is_a_slice_of_the_flat_tensor(
    folder: Path, monkeypatch: pytest.MonkeyPatch, in_two: bool, chunk: int
) -> None:
    monkeypatch.setattr(pretrained, "READ_CHUNK", chunk)
    expected = tensors_of(folder)
    if in_two:
        split(folder)
    opened, draw = open_pretrained(folder), random.Random(chunk)
    for _ in range(150):
        name = draw.choice(sorted(expected))
        numel = expected[name].numel()
        start, end = sorted((draw.randint(0, numel), draw.randint(0, numel)))
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
        shard = opened.read_flat(name, start, end, dtype)
        assert shard.dtype == dtype
        assert torch.equal(shard, expected[name].reshape(-1)[start:end].to(dtype)), (name, start, end)


@pytest.mark.parametrize("stored", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_type_on_disk_can_be_read(folder: Path, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tensors_of(folder).items()}
    save(folder, tensors)
    shard = open_pretrained(folder).read_flat(WEIGHT, 10, 500, torch.float32)
    assert torch.equal(shard, tensors[WEIGHT].reshape(-1)[10:500].float())


def test_the_shards_of_all_ranks_make_up_the_tensor(folder: Path) -> None:
    opened, expected = open_pretrained(folder), tensors_of(folder)[WEIGHT].reshape(-1)
    size = -(-len(expected) // 7)
    shards = [
        opened.read_flat(WEIGHT, min(r * size, len(expected)), min((r + 1) * size, len(expected)), torch.float32)
        for r in range(7)
    ]
    assert torch.equal(torch.cat(shards), expected)


def test_what_the_model_does_not_need_is_ignored(folder: Path) -> None:
    save(folder, tensors_of(folder) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)})
    save(folder, {"base_model.model.x": torch.ones(2)}, "adapter_model.safetensors")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in open_pretrained(folder).files


# Damage


@pytest.mark.parametrize("left", [0, 3, 100, -1, -4000])
def test_a_truncated_file(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    assert refused(folder).startswith("model.safetensors is damaged: ")


def test_a_file_of_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(5000))
    assert refused(folder).startswith("model.safetensors is damaged: ")


def test_a_missing_tensor(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors[WEIGHT]
    save(folder, tensors)
    assert refused(folder) == f"FOLDER: tensor {WEIGHT} is missing"


def test_a_missing_bias_that_the_config_promises(folder: Path) -> None:
    edit_config(folder, attention_bias=True)
    assert refused(folder) == "FOLDER: tensor model.layers.0.self_attn.q_proj.bias is missing"


def test_a_tensor_of_another_shape(folder: Path) -> None:
    tensors = tensors_of(folder)
    tensors[WEIGHT] = tensors[WEIGHT].t().contiguous()
    save(folder, tensors)
    assert refused(folder) == f"model.safetensors: {WEIGHT} has shape [24, 37]; config.json says [37, 24]"


@pytest.mark.parametrize(
    ("stored", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8")]
)
def test_a_quantized_tensor(folder: Path, stored: torch.dtype, name: str) -> None:
    """bitsandbytes and fp8 models keep a weight's shape. Read as it is, it would be nonsense."""
    tensors = tensors_of(folder)
    tensors[WEIGHT] = tensors[WEIGHT].to(stored)
    save(folder, tensors)
    assert refused(folder) == f"model.safetensors: {WEIGHT} is stored as {name}; quantized weights cannot be pruned"


def test_a_missing_weight_file(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert refused(folder) == "model-00002-of-00002.safetensors is missing; model.safetensors.index.json names it"


def test_a_damaged_weight_file(folder: Path) -> None:
    split(folder)
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(folder).startswith("model-00001-of-00002.safetensors is damaged: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "model.safetensors.index.json is not valid JSON: "),
        ("[]", "model.safetensors.index.json must hold a JSON object"),
        ("{}", "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": ["a"]}', "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": {"a": 7}}', "7 is missing; model.safetensors.index.json names it"),
        ('{"weight_map": {}}', "model.safetensors.index.json has no weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "model.safetensors.index.json: a is in ../x.safetensors; only "),
        ('{"weight_map": {"a": "/x.safetensors"}}', "model.safetensors.index.json: a is in /x.safetensors; only files"),
    ],
)
def test_a_wrong_index(folder: Path, text: str, message: str) -> None:
    split(folder).write_text(text)
    assert refused(folder).startswith(message)


def test_an_index_reaches_no_other_folder(folder: Path, tmp_path: Path) -> None:
    """Puts a whole model beside the folder and has the index name its file in three ways."""
    names = tensors_of(folder)
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "within").mkdir()
    shutil.copy(tmp_path / "x.safetensors", folder / "within")
    for named in ("../x.safetensors", str(tmp_path / "x.safetensors"), "within/x.safetensors"):
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
        assert (
            refused(folder) == f"{index.name}: {next(iter(names))} is in {named}; only files beside the index are read"
        )


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder) == "FOLDER has no safetensors files"


def test_a_surplus_weight_file(folder: Path) -> None:
    index = split(folder)
    surplus = "model-00003-of-00003.safetensors"
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / surplus)
    assert refused(folder) == f"{surplus} is one weight file too many; {index.name} does not name it"


def test_a_tensor_in_two_files(folder: Path) -> None:
    save(folder, {WEIGHT: tensors_of(folder)[WEIGHT]}, "more.safetensors")
    assert refused(folder) == f"more.safetensors: {WEIGHT} is in model.safetensors, too"


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_surplus_tensor(folder: Path, name: str) -> None:
    """config.json has no such layer, or promises no bias. The model would compute something else."""
    save(folder, tensors_of(folder) | {name: torch.ones(24)})
    assert refused(folder) == f"model.safetensors: {name} has no place in the model that config.json describes"


def test_an_adapters_folder_is_no_model(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert refused(folder) == "FOLDER has no safetensors files"


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refused(folder) == "config.json does not exist"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not valid JSON"), (b"\xff\xfe{}", "is not valid JSON"), (b"3", "must hold a JSON object")],
)
def test_json_that_is_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))} {message}"):
        read_json(path)
