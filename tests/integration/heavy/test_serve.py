"""tests/benchmarks/serving.py in the real llama.cpp and vLLM. See tests/run_heavy.sh."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.export.huggingface import copy_tokenizer
from loraprune_ds.files import read_json, write_json
from tests.integration.heavy.families import SIZES, serve
from tests.integration.heavy.results import python_of
from tests.integration.heavy.smollm2 import STOCK, write
from tests.support.export_cases import VOCAB
from tests.support.families import tiny_model
from tests.support.gguf_cases import byte_level_tokenizer
from tests.support.launching import ROOT, run_to_end
from tests.support.vllm_settings import ENVIRONMENT, WIDE

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

RESULT = ROOT / "tests/benchmarks/results/serving.json"
PYTHONS = {"llama.cpp": "LLAMA_CPP_PYTHON", "vllm": "VLLM_PYTHON"}


def time_in(server: str, here: Path, *arguments: str) -> dict[str, Any]:
    """Returns what the benchmark says about models in a server."""
    command = [sys.executable, "-m", "tests.benchmarks.serving", *arguments]
    command += ["--server", server, "--python", python_of(PYTHONS[server])]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    result = json.loads(
        run_to_end(command, cwd=here, environment=environment, timeout=1500).check().out
    )
    for served in result["models"]:
        assert served["form"] == ("hf" if server == "vllm" else "gguf-f16")
        assert 1 < served["decode_tokens_per_second"] < served["prefill_tokens_per_second"]
        assert (served["batch_tokens_per_second"] is None) == (server == "llama.cpp")
    return result


@pytest.mark.parametrize("server", PYTHONS)
def test_dense_and_pruned_are_timed_in_the_server(server: str, tmp_path: Path) -> None:
    write(STOCK, tmp_path / "pruned")
    result = time_in(server, tmp_path, "embedded", "pruned", "--prompt", "256", "--rounds", "3")
    write_json(RESULT, (read_json(RESULT) if RESULT.is_file() else {}) | {server: result})


def test_a_qwen2_runs_by_the_implementation_that_the_table_names(tmp_path: Path) -> None:
    """vLLM's own class would refuse its number of heads."""
    tokenizer = byte_level_tokenizer(tmp_path / "tokenizer", VOCAB)
    sizes: dict[str, Any] = SIZES | WIDE
    tiny_model("qwen2", **sizes).save_pretrained(tmp_path / "dense")
    copy_tokenizer(tokenizer, tmp_path / "dense")
    serve("qwen2", tmp_path / "pruned", tokenizer, **WIDE)
    time_in(
        "vllm", tmp_path, "dense", "pruned", "--prompt", "32", "--generated", "8", "--rounds", "2"
    )
