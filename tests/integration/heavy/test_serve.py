"""`launch/evaluate.py --serve` in the real llama.cpp and vLLM. See tests/run_heavy.sh."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.embedded import embedded_model_dir
from tests.export_cases import export
from tests.integration.heavy.smollm2 import STOCK
from tests.integration.heavy.test_vllm import ENVIRONMENT
from tests.integration.launching import ROOT, run_to_end

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

RESULT = ROOT / "tests/benchmarks/results/serving.json"
PYTHONS = {"llama.cpp": "LLAMA_CPP_PYTHON", "vllm": "VLLM_PYTHON"}


@pytest.mark.parametrize("server", PYTHONS)
def test_dense_and_pruned_are_timed_in_the_server(server: str, tmp_path: Path) -> None:
    python = os.environ.get(PYTHONS[server])
    if not python:
        pytest.skip(f"{PYTHONS[server]} names no Python: bash tests/run_heavy.sh --vllm")
    source = embedded_model_dir()
    export(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), STOCK, source, tmp_path / "pruned")
    command = [sys.executable, str(ROOT / "launch/evaluate.py"), "pruned", "--dense", "embedded"]
    command += ["--serve", server, "--serve-python", python, "--prompt", "256", "--rounds", "3", "--json"]
    ended = run_to_end(command, cwd=tmp_path, environment=ENVIRONMENT, timeout=1500)
    assert ended.code == 0, ended.everything
    result = json.loads(ended.out)
    result["serve_plan"].pop("python")
    write_json(RESULT, (read_json(RESULT) if RESULT.is_file() else {}) | {server: result})
    for model in (result, result["dense"]):
        served = model["served"]
        assert (served["server"], served["form"]) == (server, "hf" if server == "vllm" else "gguf-f16")
        assert 1 < served["decode_tokens_per_second"] < served["prefill_tokens_per_second"]
        assert (served["batch_tokens_per_second"] is None) == (server == "llama.cpp")
