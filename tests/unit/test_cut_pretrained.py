"""A cut model is read from the dense one's files as slices, bit by bit as if it had been written."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loraprune_ds.model import pretrained
from loraprune_ds.model.family import LLAMA_LINEARS, QUERIES
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.token_loss import build_for_losses
from tests.oracle.models import make_tiny_llama
from tests.unit.shapes_and_scores import keep_of

Kept = list[tuple[list[int], list[int]]]  # heads and channels of every layer

HEAD_DIM, QUERIES_PER_GROUP = 6, 2
UNEVEN: Kept = [([0, 1, 2, 3], [*range(0, 37, 3)]), ([1, 3], [*range(37)]), ([2], [0, 36])]
EVEN: Kept = [([0, 2], [1, 2, 3, 30]), ([1, 2], [5, 6, 7, 8]), ([2, 3], [0, 1, 2, 36])]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biases"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": HEAD_DIM, "hidden": 48, "ffn": 37, "vocab": 59}
    return make_tiny_llama(tmp_path_factory.mktemp("dense"), layers=3, seed=1, biases=request.param, **sizes)


def cut_by_hand(tensors: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    """Returns the same tensors with rows and columns left out, one group after the other."""
    left = dict(tensors)
    for i, (heads, channels) in enumerate(kept):
        for linear in LLAMA_LINEARS:
            groups, width = (heads, HEAD_DIM) if linear.kind == "heads" else (channels, 1)
            width *= QUERIES_PER_GROUP if QUERIES in linear.parts else 1
            indices = [group * width + k for group in groups for k in range(width)]
            name = f"model.layers.{i}.{linear.name}"
            left[f"{name}.weight"] = left[f"{name}.weight"].index_select(linear.axis, torch.tensor(indices))
            if linear.axis == 0 and f"{name}.bias" in left:
                left[f"{name}.bias"] = left[f"{name}.bias"][indices]
    return left


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
@pytest.mark.parametrize("kept", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_every_part_is_the_slice(folder: Path, kept: Kept, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "READ_CHUNK", chunk)
    dense = open_pretrained(folder)
    cut = dense.weights.cut(keep_of(kept))
    expected = cut_by_hand(load_file(folder / "model.safetensors"), kept)
    sizes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert cut.shape.parameters() == sizes
    assert {
        n: tuple(p.shape) for n, p in build_for_losses(replace(dense, weights=cut), "sdpa").named_parameters()
    } == sizes
    for name, tensor in expected.items():
        flat, numel = tensor.reshape(-1), tensor.numel()
        for start, end in itertools.pairwise(sorted([0, 0, 1, numel // 3, numel // 2, numel, numel])):
            assert torch.equal(cut.read_flat(name, start, end, torch.float32), flat[start:end]), (name, start, end)


def test_with_nothing_cut_it_is_the_model_on_disk(folder: Path) -> None:
    dense = open_pretrained(folder).weights
    assert dense.cut(keep_of([([0, 1, 2, 3], [*range(37)])] * 3)) is dense
