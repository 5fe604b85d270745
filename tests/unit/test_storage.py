"""How a run stores linears: by `model.frozen`, and whether refits rewrite them."""

from pathlib import Path
from typing import Any
from unittest.mock import DEFAULT, Mock, patch

import pytest
import torch

from loraprune_ds.config import ModelConfig
from loraprune_ds.model.codecs import INT8, NF4
from loraprune_ds.model.frozen import Blocks
from loraprune_ds.model.storage import Storage
from loraprune_ds.pretrained.pretrained import open_for_pruning
from loraprune_ds.train import trainer
from tests.oracle.models import make_tiny_llama
from tests.support.families import tiny_model
from tests.support.refusals import must_name

BF16 = torch.bfloat16


@pytest.mark.parametrize(
    ("frozen", "refits", "rows", "columns", "bits"),
    [
        (None, True, None, None, (16, 16)),
        ("int8", True, INT8, INT8, (8.25, 8.25)),
        ("nf4", True, NF4, INT8, (4.5, 8.25)),
        ("nf4", False, NF4, NF4, (4.5, 4.5)),
    ],
)
def test_refits_rewrite_what_loses_columns(
    tmp_path: Path, frozen: Any, refits: bool, rows: Any, columns: Any, bits: tuple[float, float]
) -> None:
    folder = make_tiny_llama(tmp_path, hidden=64, ffn=96, layers=2)
    compensate = "least_squares" if refits else "none"
    pretrained = open_for_pruning(folder, ModelConfig(frozen=frozen)).with_refits(compensate)
    shape = pretrained.shape
    storage, formats = pretrained.storage, pretrained.weights.formats
    counted = 0.0
    for layer, linear in shape.linears():
        codec = columns if linear.loses_inputs else rows
        expected = Blocks(codec, BF16, linear.loses_inputs) if codec else None
        assert formats.get(shape.prefix(layer) + linear.name) == expected
        counted += bits[linear.loses_inputs] * linear.numel / 8
    assert storage.linear_bytes(shape) == counted
    stored = storage.stored(shape)
    assert shape.parameters().keys() == {name for name in stored if not name.endswith("_scale")}


def test_experts_are_int8(tmp_path: Path) -> None:
    tiny_model("mixtral", seed=0, hidden_size=64).save_pretrained(tmp_path)
    pretrained = open_for_pruning(tmp_path, ModelConfig(frozen="nf4"))
    for layer, linear in pretrained.shape.linears():
        stored_as = pretrained.weights.formats[pretrained.shape.prefix(layer) + linear.name]
        assert stored_as.codec == (INT8 if linear.stack else NF4)


def test_a_hidden_axis_without_whole_blocks_is_named(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, hidden=72)
    names = "model.layers.0.self_attn.q_proj model.frozen int8"
    must_name(names, open_for_pruning, folder, ModelConfig(frozen="nf4"))


def test_the_first_line_of_a_run_says_what_refits_and_a_teacher_add(tmp_path: Path) -> None:
    shape = open_for_pruning(make_tiny_llama(tmp_path, hidden=64, ffn=96), ModelConfig()).shape
    both = Storage("nf4", refits=True).describe(shape, taught=True)
    assert all(part in both for part in ("nf4", "int8", "teacher"))
    assert "int8" not in Storage("nf4").describe(shape, taught=True)
    assert "teacher" not in Storage("nf4", refits=True).describe(shape, taught=False)


def test_no_linear_of_a_teacher_is_stored_for_refits(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, hidden=64, ffn=96)
    student = open_for_pruning(folder, ModelConfig(frozen="nf4")).with_refits("least_squares")
    prepared = Mock(pretrained=student)
    parts = ("build_engine", "find_peft_model", "connect", "Pruning", "Trainer")
    with patch.multiple(trainer, **dict.fromkeys(parts, DEFAULT)):
        trainer.build_trainer(prepared, Mock())
    taught = prepared.engine.build_inference_engine.call_args.args[0].weights
    assert {stored_as.codec for stored_as in taught.formats.values()} == {NF4}
