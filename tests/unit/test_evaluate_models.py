"""Models are found by any name a user may give, and adapters are merged right."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds.checkpoint.layout import Status, write_status
from loraprune_ds.generate.models import choose_dtype, find_model, load_model, open_result
from tests.oracle.models import LINEARS, make_lora, make_tiny_llama, make_tokenizer
from tests.support.evaluations import measured_of
from tests.support.export_cases import CASES, VOCAB, dense_model, export, exported_config
from tests.support.refusals import Spoil, edit, edit_tensors, must_name, remove, truncate, write

CPU = torch.device("cpu")
GLOBAL = next(case for case in CASES if case.name == "layers_gqa_biases")
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
REPORT = {"measured": measured_of("model", 0.25)}
KEPT = {"layers": [{"heads": [0, 2], "heads_dense": 4}] * 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes dense/, pruned/ (layers differ), adapter/ on dense/, and run/."""
    root = tmp_path_factory.mktemp("models")
    make_tiny_llama(root / "dense")
    make_tokenizer(VOCAB).save_pretrained(root / "tokenizer")
    (root / "tokenizer" / "config.json").write_text(dense_model(GLOBAL).config.to_json_string())
    export(dense_model(GLOBAL), GLOBAL, root / "tokenizer", root / "pruned")
    make_adapter(root / "dense", root / "adapter")
    shutil.copytree(root / "pruned", root / "run" / "model")
    (root / "run" / "report.json").write_text(json.dumps(REPORT))
    (root / "run" / "kept_groups.json").write_text(json.dumps(KEPT))
    write_status(root / "run", Status("finished", 8, 8))
    return root


def make_adapter(base: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[name.split(".")[1] for name in LINEARS])
    wrapped: Any = get_peft_model(model, config)
    for name, factor in make_lora(base, r=4, seed=2).items():
        module, _, which = name.rpartition(".")
        wrapped.get_submodule(f"base_model.model.model.{module}.{which}.default").weight.data.copy_(
            factor
        )
    wrapped.save_pretrained(folder)


def test_each_kind_is_told_apart(made: Path) -> None:
    kinds = {
        name: find_model(str(made / name)).kind for name in ("dense", "pruned", "adapter", "run")
    }
    assert kinds == {
        "dense": "checkpoint",
        "pruned": "checkpoint",
        "adapter": "adapter",
        "run": "run",
    }
    run = find_model(str(made / "run"))
    assert run.method == "lora, uniform"
    assert run.tokenizer_folder == made / "run" / "model"


def test_a_pruned_model_loads_without_asking_to_run_its_code(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    model = load_model(find_model(str(made / "pruned")), "float32", CPU)
    assert (type(model).__name__, model.config.model_type) == ("PrunedForCausalLM", "pruned_llama")
    shape = exported_config(dense_model(GLOBAL), GLOBAL)[2]
    assert sum(p.numel() for p in model.parameters()) == shape.total_numel()
    assert not model.training


def test_an_adapter_is_merged_in_fp32_and_rounded_once(made: Path) -> None:
    """Compares with the formula W + (alpha / r)·B·A on the saved factors."""
    source = find_model(str(made / "adapter"))
    merged = load_model(source, "float32", CPU)
    base, lora = (
        load_model(find_model(str(made / "dense")), "float32", CPU),
        make_lora(made / "dense", r=4, seed=2),
    )
    for layer, linear in [(0, "self_attn.q_proj"), (1, "mlp.down_proj")]:
        name = f"layers.{layer}.{linear}"
        weight = f"model.{name}.weight"
        change = 2 * lora[f"{name}.lora_B"] @ lora[f"{name}.lora_A"]
        assert change.abs().max() > 0.01
        expected = base.get_parameter(weight) + change
        torch.testing.assert_close(merged.get_parameter(weight), expected, check_stride=False)
    rounded = load_model(source, "bfloat16", CPU)
    for name, weight in merged.named_parameters():
        assert torch.equal(rounded.get_parameter(name), weight.to(torch.bfloat16))
    frequencies = "model.rotary_emb.inv_freq"
    assert torch.equal(rounded.get_buffer(frequencies), merged.get_buffer(frequencies))


def test_an_adapter_may_have_a_relative_base_and_its_own_tokenizer(
    made: Path, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(made / "pruned", base)
    shutil.copytree(made / "adapter", adapter)
    assert find_model(str(adapter)).tokenizer_folder == made / "dense"
    edit(CONFIG, base_model_name_or_path="../base")(adapter)
    make_tokenizer(97).save_pretrained(adapter)
    source = find_model(str(adapter))
    assert source.pretrained.folder.samefile(base)
    assert source.tokenizer_folder == adapter


def test_dtype_is_the_models_own_unless_named(made: Path) -> None:
    source = find_model(str(made / "dense"))
    assert choose_dtype(source, None) == "float32"
    assert choose_dtype(source, "bfloat16") == "bfloat16"
    source.pretrained.config["dtype"] = "float8"
    must_name("float8 --dtype", choose_dtype, source, None)


# Results


def test_a_result_is_opened_from_its_run_or_its_model(made: Path) -> None:
    run, bare = open_result(made / "run"), open_result(str(made / "pruned"))
    assert (run.folder, bare.folder) == (made / "run" / "model", made / "pruned")
    assert run.report == open_result(run.folder).report == REPORT
    assert run.kept_groups == open_result(run.folder).kept_groups == KEPT["layers"]
    assert bare.report is bare.kept_groups is None
    assert (
        run.load_tokenizer()("text")["input_ids"]
        == AutoTokenizer.from_pretrained(run.folder)("text")["input_ids"]
    )
    expected = AutoModelForCausalLM.from_pretrained(
        made / "pruned", dtype="auto", trust_remote_code=True
    )
    (run.folder / "modeling_pruned.py").write_text(
        "raise RuntimeError('code of the folder was run')"
    )
    found, token_ids = run.load_model(attn_implementation="sdpa"), torch.arange(20)[None]
    assert torch.equal(found(input_ids=token_ids).logits, expected(input_ids=token_ids).logits)
    half = run.load_model(dtype=torch.bfloat16)
    assert (found.dtype, half.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("name", ["tokenizer", "adapter", "nothing"])
def test_a_folder_without_a_result_is_one_line(made: Path, name: str) -> None:
    must_name(str(made / name), open_result, made / name)


# Bad input


@pytest.mark.parametrize(
    ("kind", "spoil", "names"),
    [
        ("dense", remove("config.json"), "config.json"),
        ("run", edit("status.json", state="running", step=3), "running 3 8"),
        ("run", remove("report.json"), "report.json"),
        ("run", write("report.json", '{"params": {}}'), "report.json"),
        ("run", remove("model/config.json"), "model/config.json"),
        ("adapter", remove(TENSORS), TENSORS),
        ("adapter", edit(CONFIG, peft_type="IA3"), f"{CONFIG} LoRA"),
        (
            "adapter",
            edit(CONFIG, base_model_name_or_path=None),
            f"{CONFIG} base_model_name_or_path",
        ),
        ("adapter", edit(CONFIG, base_model_name_or_path="/no"), "/no"),
        ("adapter", edit_tensors(dict.popitem, TENSORS), "adapter"),
        ("adapter", truncate(TENSORS), "adapter"),
        (
            "adapter",
            lambda here: edit(CONFIG, base_model_name_or_path=str(here.parent / "pruned"))(here),
            "adapter",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_named(
    made: Path, tmp_path: Path, kind: str, spoil: Spoil, names: str
) -> None:
    here = tmp_path / "spoilt"
    shutil.copytree(made / kind, here)
    shutil.copytree(made / "pruned", tmp_path / "pruned")  # another base
    spoil(here)
    must_name(f"{here} {names}", lambda: load_model(find_model(str(here)), "float32", CPU))


def test_no_such_model(tmp_path: Path) -> None:
    must_name(f"{tmp_path}/nothing", find_model, str(tmp_path / "nothing"))
    (tmp_path / "model.bin").touch()
    must_name("model.bin", find_model, str(tmp_path / "model.bin"))
