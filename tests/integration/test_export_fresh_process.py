"""Gives exported models to a stranger: a process that has transformers but not this package."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from loraprune_ds.pretrained.exported_config import ExportedConfig
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pretrained.tokenizer import load_tokenizer
from tests.integration.heavy.results import record
from tests.support.export_cases import CASES, VOCAB, Case, cut, dense_model, export
from tests.support.gguf_cases import sentencepiece_tokenizer
from tests.support.stranger import LOOK, OTHER_TRANSFORMERS, ask_stranger

NEW_TOKENS = 8  # as in LOOK
PROMPT = torch.arange(24).view(2, 12) * 7 % VOCAB  # longer than the sliding window of 5
# Weights and kernels are the same, so in practice the difference is 0. One ulp of a logit of 4 is 5e-7.
SAME = 1e-6
# Eager and sdpa attention add in another order, in the model's dtype. bf16 has 8 bits of mantissa, the model three
# layers.
EAGER = {"float32": 1e-5, "bfloat16": 0.1}
TEXTS = ["The  import statement\n\tdef f(x):", "one</s>two <s> three", " lead", ""]

STRANGER = """
def report(folder, trust, prompt, texts):
    model = load(folder)
    result = look(model, folder, prompt) | {"dtype": torch.empty(0, dtype=model.dtype)}
    result["hidden"] = load(folder, AutoModel)(prompt).last_hidden_state
    result["static"] = generate(model, prompt, cache_implementation="static")
    model.set_attn_implementation("eager")
    eager = model(prompt, output_attentions=True)
    result["eager"] = eager.logits
    result["attended"] = torch.stack([layer.float().sum((1, 2, 3)) for layer in eager.attentions])
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    for i, text in enumerate(texts):
        result[f"text{i}"] = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
    return result

job = json.loads(sys.argv[1])
prompt = load_file(job["prompt"])["prompt"]
for folder in job["folders"]:
    trust = {"trust_remote_code": True} if folder in job["trusted"] else {}
    tell(report(folder, trust, prompt, job["texts"]), folder)
"""


@dataclass
class Exported:
    """Holds a case on disk, the in-memory model it must equal, and the stranger's findings."""

    case: Case
    folder: Path
    config: ExportedConfig
    reference: PreTrainedModel
    source: Path
    found: dict[str, Tensor]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Exports all cases here. One fresh process elsewhere reads them."""
    root = tmp_path_factory.mktemp("exports")
    results = {}
    for case in CASES:
        model = dense_model(case)
        source = sentencepiece_tokenizer(root / f"{case.name}_source", VOCAB)
        model.config.save_pretrained(source)
        config = export(model, case, source, root / case.name)
        results[case.name] = Exported(case, root / case.name, config, cut(model, case), source, {})
    run_stranger(list(results.values()), root)
    for result in results.values():
        result.found = load_file(f"{result.folder}.safetensors")
    return results


def run_stranger(exports: list[Exported], root: Path) -> None:
    save_file({"prompt": PROMPT.contiguous()}, root / "prompt.safetensors")
    job = {
        "prompt": str(root / "prompt.safetensors"),
        "folders": [str(export.folder) for export in exports],
        "trusted": [str(export.folder) for export in exports if export.config.modelling_file],
        "texts": TEXTS,
    }
    ask_stranger(LOOK + STRANGER, json.dumps(job), folder=root)


@pytest.fixture(params=CASES, ids=str)
def exported(request: pytest.FixtureRequest, exports: dict[str, Exported]) -> Exported:
    return exports[request.param.name]


def test_logits_equal_the_cut_model_in_memory(exported: Exported) -> None:
    assert exported.found["dtype"].dtype == getattr(torch, exported.case.dtype)
    with torch.no_grad():
        torch.testing.assert_close(
            exported.found["logits"], exported.reference(PROMPT).logits, rtol=0, atol=SAME
        )
        hidden = exported.reference.get_submodule("model")(PROMPT).last_hidden_state
    torch.testing.assert_close(exported.found["hidden"], hidden, rtol=0, atol=SAME)


@pytest.mark.parametrize("how", ["uncached", "cached", "static"])
@pytest.mark.parametrize(
    "exported", [case for case in CASES if case.dtype == "float32"], ids=str, indirect=True
)
def test_greedy_text_equals_stepwise_argmax(exported: Exported, how: str) -> None:
    """Compares tokens in fp32 only. bf16 sums differ with the number of tokens at a time. Close tokens may swap."""
    tokens = PROMPT
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            logits = exported.reference(tokens, use_cache=False).logits[:, -1]
        logits[:, exported.reference.config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(exported.found[how], tokens)


def test_saved_again_by_transformers_is_the_same_model(exported: Exported) -> None:
    torch.testing.assert_close(
        exported.found["saved_again"], exported.found["logits"], rtol=0, atol=0
    )
    again = exported.folder.with_name(exported.folder.name + "_saved_again")
    code = sorted(path.name for path in again.glob("*.py"))
    assert code == ([exported.config.modelling_file] if exported.config.modelling_file else [])
    config = json.loads((again / "config.json").read_text())
    assert config["model_type"] == exported.case.becomes
    shape = shape_from_config(config, "saved again")
    assert [
        (layer.key_value_heads, layer.counts["channels"]) for layer in shape.layers
    ] == exported.case.keep


def test_attention_implementation_reaches_every_layer(exported: Exported) -> None:
    """Asks for attention weights. Only eager attention returns them. A layer left on sdpa would have none."""
    found, tolerance = exported.found, EAGER[exported.case.dtype]
    torch.testing.assert_close(found["eager"], found["logits"], rtol=0, atol=tolerance)
    queries = (
        exported.case.sizes["num_attention_heads"] // exported.case.sizes["num_key_value_heads"]
    )
    # Each query head spreads a weight of 1 per position over the keys.
    expected = torch.tensor(
        [[heads * queries * PROMPT.shape[1]] * 2 for heads, _ in exported.case.keep]
    )
    torch.testing.assert_close(exported.found["attended"], expected.float(), rtol=0.01, atol=0)


def test_tokens_equal_those_of_the_run(exported: Exported) -> None:
    """Compares with our loader, since AutoTokenizer alone splits a Mistral's texts in another way."""
    tokenizer = load_tokenizer(exported.source)
    assert not (exported.source / "tokenizer.json").exists()
    for i, text in enumerate(TEXTS):
        assert exported.found[f"text{i}"].tolist() == tokenizer(text)["input_ids"]


@pytest.mark.heavy
@pytest.mark.skipif(OTHER_TRANSFORMERS is None, reason="for tests/run_heavy.sh --transformers")
def test_what_another_transformers_found_is_recorded(exports: dict[str, Exported]) -> None:
    rows = []
    for name, exported in exports.items():
        tokenizer = load_tokenizer(exported.source)
        same = [
            exported.found[f"text{i}"].tolist() == tokenizer(text)["input_ids"]
            for i, text in enumerate(TEXTS)
        ]
        with torch.no_grad():
            difference = (
                (exported.found["logits"] - exported.reference(PROMPT).logits).abs().max().item()
            )
        rows.append(
            {"case": name, "architecture": exported.case.becomes, "precision": exported.case.dtype}
        )
        rows[-1] |= {"largest_difference": difference, "texts": len(TEXTS), "texts_same": sum(same)}
    (folder,) = Path(str(OTHER_TRANSFORMERS)).glob("transformers-*.dist-info")
    record("transformers", folder.stem.replace("-", " "), rows)
    assert all(
        row["largest_difference"] <= SAME and row["texts_same"] == row["texts"] for row in rows
    )
