"""Reads GGUF files back with gguf-py: every tensor, every size, and the errors for models that no file can hold."""

import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, get_tensor_name_map
from gguf.quants import dequantize
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loraprune_ds.export.gguf import llama3_factors, write_gguf
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.support.export_cases import CASES, LLAMA3, VOCAB, Case, dense_model, export, widths
from tests.support.gguf_cases import byte_level_tokenizer, value
from tests.support.refusals import edit, edit_tensors, must_name
from tests.support.resuming import read_tensors

FACTORS = "rope_freqs.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports all cases as merged models."""
    root = tmp_path_factory.mktemp("models")
    source = byte_level_tokenizer(root / "tokenizer", VOCAB)
    for case in CASES:
        export(dense_model(case), case, source, root / case.name)
    return {case.name: root / case.name for case in CASES}


def make_model(case: Case, root: Path) -> Path:
    export(dense_model(case), case, byte_level_tokenizer(root / "tokenizer", VOCAB), root / "model")
    return root / "model"


def convert(model: Path, out: Path, precision: Any = "f16") -> tuple[GGUFReader, list[str]]:
    remarks = write_gguf(open_pretrained(model), out, precision, "tiny")
    return GGUFReader(out), remarks


def named_as_in_llama_cpp(model: Path) -> dict[str | None, Tensor]:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 100)
    return {
        names.get_name(name, (".weight", ".bias")): tensor
        for name, tensor in read_tensors(model).items()
    }


def wanted_values(name: str, expected: dict[str | None, Tensor], head_dim: int) -> np.ndarray:
    """Orders rows one by one: llama.cpp's 2i and 2i + 1 of a head are transformers' i and i + head_dim / 2."""
    rows = expected[name].float().numpy()
    if ".attn_q." not in name and ".attn_k." not in name:
        return rows
    starts, half = range(0, len(rows), head_dim), head_dim // 2
    return rows[
        [start + pair + side for start in starts for pair in range(half) for side in (0, half)]
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_and_size_is_there(
    case: Case, models: dict[str, Path], tmp_path: Path
) -> None:
    reader, _ = convert(models[case.name], tmp_path / "m.gguf")
    expected = named_as_in_llama_cpp(models[case.name])
    tensors = [tensor for tensor in reader.tensors if tensor.name != FACTORS]
    assert {tensor.name for tensor in tensors} == expected.keys()
    for tensor in tensors:
        want = wanted_values(tensor.name, expected, case.sizes["head_dim"])
        dtype = np.float16 if want.ndim == 2 else np.float32
        assert tensor.data.dtype == dtype
        np.testing.assert_array_equal(tensor.data, want.astype(dtype), err_msg=tensor.name)

    arch, uniform = value(reader, "general.architecture"), len(set(case.keep)) == 1
    assert arch == ("llama" if uniform else "deci")
    queries = widths(case)[0] // widths(case)[1]
    for key, want in {
        "attention.head_count": [heads * queries for heads, _ in case.keep],
        "attention.head_count_kv": [heads for heads, _ in case.keep],
        "feed_forward_length": [channels for _, channels in case.keep],
    }.items():
        assert value(reader, f"{arch}.{key}") == (want[0] if uniform else want)
    for key, want in {
        "attention.key_length": case.sizes["head_dim"],
        "attention.value_length": case.sizes["head_dim"],
        "rope.dimension_count": case.sizes["head_dim"],
        "embedding_length": case.sizes["hidden_size"],
        "block_count": len(case.keep),
        "vocab_size": VOCAB,
        "rope.freq_base": 5000.0,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
    }.items():
        assert value(reader, f"{arch}.{key}") == want


def test_q8_0_is_within_half_a_step_and_odd_rows_stay_f16(tmp_path: Path) -> None:
    """The other cases have rows of 48, almost all of which stay f16. This one has rows of 64."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    sizes = heads | {"hidden_size": 64, "intermediate_size": 96}
    model = make_model(
        Case("q8", "llama", sizes, [(4, 64), (2, 37), (3, 96)], "pruned_llama"), tmp_path
    )
    reader, remarks = convert(model, tmp_path / "m.gguf", "q8_0")
    expected, halves = named_as_in_llama_cpp(model), set()
    for tensor in reader.tensors:
        if tensor.tensor_type == GGMLQuantizationType.F16:
            halves.add(tensor.name)
        elif tensor.tensor_type == GGMLQuantizationType.Q8_0:
            want = wanted_values(tensor.name, expected, 8).reshape(-1, 32)
            # A block's largest value is 127 steps. The step itself is rounded to f16 (11 bits).
            limit = np.abs(want).max(1, keepdims=True) * (0.5 / 127 + 2**-11)
            assert (
                np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - want) <= limit
            ).all()
    # 37 and 3 * 2 * 8 columns
    assert halves == {"blk.1.ffn_down.weight", "blk.2.attn_output.weight"}
    assert [remark.partition(",")[0] for remark in remarks] == ["2 tensors stay f16"]


def test_window_and_rope_scaling(models: dict[str, Path], tmp_path: Path) -> None:
    reader, remarks = convert(models["window"], tmp_path / "window.gguf")
    assert value(reader, "llama.context_length") == 5
    assert "sliding window" in remarks[0]
    reader, remarks = convert(models["layers_no_window"], tmp_path / "no_window.gguf")
    assert value(reader, "deci.context_length") == 64
    assert remarks == []
    # LLaMA's class has no window
    stray = edit_config(models["mha"], tmp_path / "stray", sliding_window=5)
    reader, remarks = convert(stray, tmp_path / "stray.gguf")
    assert (value(reader, "llama.context_length"), remarks) == (64, [])
    reader, _ = convert(models["stand_in"], tmp_path / "linear.gguf")
    assert value(reader, "llama.rope.scaling.type") == "linear"
    assert value(reader, "llama.rope.scaling.factor") == 2.0
    reader, _ = convert(models["layers_gqa_biases"], tmp_path / "llama3.gguf")
    assert value(reader, "deci.rope.scaling.type") is None
    factors = next(tensor for tensor in reader.tensors if tensor.name == FACTORS)
    np.testing.assert_array_equal(factors.data, llama3_factors(LLAMA3, 6))


def test_llama3_factors_are_those_of_transformers() -> None:
    rope = LLAMA3 | {
        "rope_theta": 500000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, head_dim=128, rope_parameters=rope
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = llama3_factors(rope, 128)
    assert len(set(factors.tolist())) > 5  # both ends and between
    np.testing.assert_allclose(factors, (plain / scaled).numpy(), rtol=1e-5)


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """Measures numpy's share, which tracemalloc sees: permuted, rounded and quantised values."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
    case = Case(
        "deep",
        "llama",
        heads | {"hidden_size": 256, "intermediate_size": 256},
        [(4, 256)] * 24,
        "llama",
    )
    model = make_model(case, tmp_path)
    tracemalloc.start()
    convert(model, tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(t.numel() * 2 for t in read_tensors(model).values()) > 20_000_000
    # Names and headers are a tenth of that. The vocabulary's tensor has 400 kB in fp32.
    assert peak < 4_000_000


def edit_config(model: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(model, copy)
    edit("config.json", **changes)(copy)
    return copy


def test_a_value_beyond_f16_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    name, model = (
        "model.layers.1.mlp.up_proj.weight",
        edit_config(models["mha"], tmp_path / "model"),
    )
    path = next(p for p in model.glob("*.safetensors") if name in load_file(p))
    edit_tensors(lambda tensors: tensors[name].fill_(7e4), path.name)(model)
    must_name(name, convert, model, tmp_path / "m.gguf")
