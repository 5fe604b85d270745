"""Compares GGUF exports in llama.cpp with transformers that rounds alike. See tests/run_heavy.sh.

On CPUs llama.cpp rounds both factors: to f16, or with q8_0 weights to 8 bits per block of 32. So does the reference.
Left are the order of sums, f16 tables inside llama.cpp, and values near the middle of two steps.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loraprune_ds.export.contents import FolderContents
from loraprune_ds.export.formats import export as export_format
from loraprune_ds.export.gguf_architecture import ARCHITECTURES, architecture_name
from loraprune_ds.model.experts import ExpertStack, stack_experts
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.sources import embedded_model_dir
from tests.integration.heavy.families import GROUPS, deep, serve
from tests.integration.heavy.results import ask, python_of, record, selected
from tests.integration.heavy.smollm2 import DENSE, LONG_TEXT, PRUNED, write
from tests.support.export_cases import CASES, VOCAB, WIDE, dense_model, export
from tests.support.families import YARN
from tests.support.gguf_cases import (
    PHI3,
    TEXTS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    without_sentencepiece,
)

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

PRECISIONS = ("f16", "q8_0")
# Root mean square of the logits' differences at a position, the median of all, as a part of their spread. One value
# that rounds the other way makes others do so through 30 layers. The dense SmolLM2 shows the size of that. Where two
# experts are nearly equal, the router of a single position may choose the other.
TOLERANCE = {"f16": 0.005, "q8_0": 0.1}
NEW_TOKENS = 16


REAL = [DENSE, *PRUNED]  # dense: what is usual
TINY = [*CASES, *WIDE]

AS_PUBLISHED = {
    "rope_parameters": YARN["rope_parameters"]
    | {"mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True}
}
# Family, groups that layers keep if they differ, and other settings. With 46 or 62 layers llama.cpp takes another
# attention scale, as in the 27B models.
FAMILIES: dict[str, tuple[str, list[tuple[int, int]], dict[str, Any]]] = {
    **{PHI3 if family == "phi3" else family: (family, [], {}) for family in ARCHITECTURES},
    "qwen2_layers": ("qwen2", [(2, 96), (3, 77)], {}),
    f"{PHI3}_layers": ("phi3", [(2, 96), (3, 77)], {}),
    "deepseek_v3_groups": ("deepseek_v3", [(2, 8)] * 2, GROUPS),
    "deepseek_v3_yarn": ("deepseek_v3", [], AS_PUBLISHED),
    "gemma2_deep": ("gemma2", [], deep(46, 2)),
    "gemma3_deep": ("gemma3_text", [], deep(62, 6)),
}


TOKENIZERS: dict[str, Callable[[Path, int], Path]] = {
    "gpt-2": byte_level_tokenizer,
    **{name: partial(byte_level_tokenizer, pre=name) for name in ("smollm", "qwen2", "gpt-4o")},
    "llama-bpe": partial(byte_level_tokenizer, pre="llama-bpe", bos=True),
    "sentencepiece": sentencepiece_tokenizer,
    "merges": without_sentencepiece,
}
# Of families that nothing else reads.
OWN = {
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text"),
        ("qwen35", partial(byte_level_tokenizer, pre="qwen35")),
    )
}


@dataclass
class Compared:
    """One file and what both sides said about it."""

    case: str
    architecture: str
    precision: str
    tokenizer: str
    merged: Path
    file: Path
    prompt: list[int]
    new_tokens: int
    texts: list[str]
    found: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return f"{self.case}-{self.precision}"

    def question(self) -> dict[str, Any]:
        question = {name: getattr(self, name) for name in ("prompt", "new_tokens", "texts")}
        return question | {"file": str(self.file), "context": len(self.prompt) + self.new_tokens}


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, dict[str, Any]]:
    """Returns a row of the result file per case and precision. llama.cpp reads them in its own process."""
    python = python_of("LLAMA_CPP_PYTHON")
    root = tmp_path_factory.mktemp("gguf")
    cases = {name.rpartition("-")[0] for name in selected(request)}
    items = [*make_tiny(root, cases), *make_families(root, cases), *make_real(root, cases)]
    job = {
        "questions": {item.name: item.question() for item in items},
        "out": str(root / "found.npz"),
    }
    (root / "job.json").write_text(json.dumps(job))
    ask(python, Path(__file__).with_name("ask_llama_cpp.py"), root / "job.json", cwd=root)
    found = dict(np.load(root / "found.npz"))
    for item in items:
        item.found = {
            key.split("/")[1]: value
            for key, value in found.items()
            if key.startswith(f"{item.name}/")
        }
    results = {item.name: row(item) for item in items}
    shown = list(results.values())
    record("llama.cpp", f"llama-cpp-python {found['version']}", shown, cases=CASE_NAMES)
    return results


def make_tiny(root: Path, cases: set[str]) -> list[Compared]:
    items = []
    for case, (name, make) in zip(TINY, itertools.cycle(TOKENIZERS.items()), strict=False):
        if case.name not in cases:
            continue
        folder = root / case.name
        folder.mkdir()
        export(dense_model(case), case, make(folder / "tokenizer", VOCAB), folder / "model")
        # Within a sliding window, which such a file is for. Without one, 64 positions.
        tokens, new = (3, 2) if case.options.get("sliding_window") else (24, NEW_TOKENS)
        prompt = (torch.arange(tokens) * 7 % VOCAB).tolist()
        items += convert(case.name, name, folder, prompt, new, TEXTS)
    return items


def make_families(root: Path, cases: set[str]) -> list[Compared]:
    items, others = [], itertools.cycle(TOKENIZERS.items())
    for name, (family, counts, changes) in FAMILIES.items():
        tokenizer, make = OWN[family] if family in OWN else next(others)
        if name not in cases:
            continue
        folder = root / name
        folder.mkdir()
        serve(family, folder / "model", make(folder / "tokenizer", VOCAB), *counts, **changes)
        prompt = (torch.arange(24) * 7 % VOCAB).tolist()
        items += convert(name, tokenizer, folder, prompt, NEW_TOKENS, TEXTS)
    return items


def make_real(root: Path, cases: set[str]) -> list[Compared]:
    prompt = AutoTokenizer.from_pretrained(embedded_model_dir())(LONG_TEXT).input_ids[:64]
    items = []
    for case in (x for x in REAL if x.name in cases):
        (root / case.name).mkdir()
        write(case, root / case.name / "model")
        items += convert(
            case.name, "embedded", root / case.name, prompt, NEW_TOKENS, [*TEXTS, LONG_TEXT]
        )
    return items


def convert(
    case: str, tokenizer: str, folder: Path, prompt: list[int], new_tokens: int, texts: list[str]
) -> list[Compared]:
    items, model = [], folder / "model"
    made = open_pretrained(model)
    architecture = str(architecture_name(made.config, made.shape))
    for precision in PRECISIONS:
        export_format(
            FolderContents(Path(case), "is a model", model), f"gguf-{precision}", folder / precision
        )
        file = folder / precision / f"{case}-{precision}.gguf"
        given = prompt, new_tokens, texts, {}
        items.append(Compared(case, architecture, precision, tokenizer, model, file, *given))
    return items


def reference(item: Compared) -> PreTrainedModel:
    """Returns the merged fp32 model, which rounds as llama.cpp does. Routers and a shared expert's gate stay fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        item.merged, dtype=torch.float32, trust_remote_code=True
    ).eval()
    stack_experts(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and len(module.weight) > 1:
            weight = module.weight.data
            if isinstance(module, ExpertStack) and module.transposed:
                blocks = weight.unflatten(0, (module.experts, -1)).transpose(1, 2)
                weight.copy_(
                    rounded(blocks.contiguous(), item.precision).transpose(1, 2).flatten(0, 1)
                )
            else:
                weight.copy_(rounded(weight, item.precision))
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(
                    lambda _, inputs: (rounded(inputs[0], item.precision), *inputs[1:])
                )
    return model


def rounded(values: Tensor, precision: str) -> Tensor:
    """Rounds to the type that the file has for rows of this length, and back."""
    kind = (
        GGMLQuantizationType.F16
        if precision == "f16" or values.shape[-1] % 32
        else GGMLQuantizationType.Q8_0
    )
    return torch.from_numpy(dequantize(quantize(values.numpy(), kind), kind))


@torch.no_grad()
def expected(item: Compared) -> tuple[np.ndarray, list[int], list[float]]:
    """Returns logits (tokens, vocab), the greedy continuation, and by how much each token was ahead."""
    model = reference(item)
    result = model(torch.tensor([item.prompt]), use_cache=True)
    logits, greedy, margins = result.logits[0].numpy(), [], []
    for _ in range(item.new_tokens):
        best = result.logits[0, -1].topk(2)
        margins.append((best.values[0] - best.values[1]).item())
        greedy.append(int(best.indices[0]))
        cache = result.past_key_values
        result = model(best.indices[None, :1], past_key_values=cache, use_cache=True)
    return logits, greedy, margins


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase, item: Compared) -> list[int]:
    """Returns tokens by transformers, and the one before a space that transformers 5 leaves out."""
    if text.startswith(" ") and item.tokenizer in ("sentencepiece", "merges"):
        folder = item.merged.parent / ("spm" if item.tokenizer == "merges" else "tokenizer")
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        return [processor.bos_id(), *processor.encode(text)]
    return tokenizer(text).input_ids


def row(item: Compared) -> dict[str, Any]:
    """Builds the row of one GGUF file for the result file."""
    logits, greedy, margins = expected(item)
    same = list(
        itertools.takewhile(lambda i: item.found["greedy"][i] == greedy[i], range(item.new_tokens))
    )
    tokenizer = AutoTokenizer.from_pretrained(item.merged, trust_remote_code=True)
    texts = [(item.found[f"text{i}"], text) for i, text in enumerate(item.texts)]
    return {
        "case": item.case,
        "architecture": item.architecture,
        "precision": item.precision,
        "tokenizer": item.tokenizer,
        "largest_difference": float(np.abs(item.found["logits"] - logits).max()),
        "rms_difference": float(
            np.median(np.sqrt(np.square(item.found["logits"] - logits).mean(-1)))
        ),
        "spread": float(logits.std()),
        "greedy_tokens": item.new_tokens,
        "greedy_same": len(same),
        "margin_at_first_other": None if len(same) == item.new_tokens else margins[len(same)],
        "texts": len(item.texts),
        "texts_same": sum(
            found.tolist() == tokens_of(text, tokenizer, item) for found, text in texts
        ),
    }


CASE_NAMES = [*(case.name for case in (*TINY, *REAL)), *FAMILIES]
ALL = [f"{name}-{precision}" for name in CASE_NAMES for precision in PRECISIONS]


@pytest.mark.parametrize("name", ALL)
def test_logits(name: str, rows: dict[str, dict[str, Any]]) -> None:
    result = rows[name]
    assert result["rms_difference"] <= TOLERANCE[result["precision"]] * result["spread"]


@pytest.mark.parametrize("name", ALL)
def test_greedy_tokens(name: str, rows: dict[str, dict[str, Any]]) -> None:
    """Compares tokens to the end, or to a place where two tokens are nearer than the tolerance."""
    result = rows[name]
    if result["greedy_same"] < result["greedy_tokens"]:
        assert (
            result["margin_at_first_other"] <= 2 * TOLERANCE[result["precision"]] * result["spread"]
        )


def test_most_greedy_texts_are_the_same_to_the_end(rows: dict[str, dict[str, Any]]) -> None:
    same = [name for name, row in rows.items() if row["greedy_same"] == row["greedy_tokens"]]
    assert len(same) >= 0.8 * len(rows)


@pytest.mark.parametrize("name", ALL)
def test_texts_are_the_same_tokens(name: str, rows: dict[str, dict[str, Any]]) -> None:
    assert rows[name]["texts_same"] == rows[name]["texts"]
