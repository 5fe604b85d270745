"""Models are found by any name a user may give, and adapters are merged right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.checkpoint.run_folder import Status, write_status
from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.models import choose_dtype, find_model, load_model
from tests.export_cases import CASES, VOCAB, dense_model, export, exported_config
from tests.oracle.models import LINEARS, make_lora, make_tiny_llama, make_tokenizer

CPU = torch.device("cpu")
IDS = torch.arange(40).view(2, 20) % 90
GLOBAL = next(case for case in CASES if case.name == "layers_gqa_biases")
REPORT = {"params": {"dense": 2_000_000}, "config": {"prune": {"criterion": "lora", "ranking": "uniform"}}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes dense/, pruned/ (layers differ), adapter/ on dense/, and run/."""
    root = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32, "ffn": 48, "layers": 2}
    make_tiny_llama(root / "dense", vocab=97, seed=1, **sizes)
    make_tokenizer(VOCAB).save_pretrained(root / "tokenizer")
    (root / "tokenizer" / "config.json").write_text(dense_model(GLOBAL).config.to_json_string())
    export(dense_model(GLOBAL), GLOBAL, root / "tokenizer", root / "pruned")
    make_adapter(root / "dense", root / "adapter")
    make_run(root)
    return root


def make_adapter(base: Path, folder: Path, **options: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[name.split(".")[1] for name in LINEARS], **options)
    wrapped: Any = get_peft_model(model, config)
    for name, factor in make_lora(base, r=4, seed=2).items():
        module, _, which = name.rpartition(".")
        wrapped.get_submodule(f"base_model.model.model.{module}.{which}.default").weight.data.copy_(factor)
    wrapped.save_pretrained(folder)


def make_run(root: Path) -> Path:
    run = root / "run"
    shutil.copytree(root / "pruned", run / "model")
    (run / "report.json").write_text(json.dumps(REPORT))
    write_status(run, Status("finished", 8, 8))
    return run


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_each_kind_is_told_apart(made: Path) -> None:
    kinds = {name: find_model(str(made / name)).kind for name in ("dense", "pruned", "adapter", "run")}
    assert kinds == {"dense": "checkpoint", "pruned": "checkpoint", "adapter": "adapter", "run": "run"}
    run = find_model(str(made / "run"))
    assert (run.dense_parameters, run.method) == (2_000_000, "lora, uniform")
    assert run.tokenizer_folder == made / "run" / "model"


def test_a_pruned_model_loads_without_asking_to_run_its_code(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    base, lora = load_model(find_model(str(made / "dense")), "float32", CPU), make_lora(made / "dense", r=4, seed=2)
    for layer, linear in [(0, "self_attn.q_proj"), (1, "mlp.down_proj")]:
        name = f"layers.{layer}.{linear}"
        weight = f"model.{name}.weight"
        expected = base.get_parameter(weight) + 2 * lora[f"{name}.lora_B"] @ lora[f"{name}.lora_A"]
        torch.testing.assert_close(merged.get_parameter(weight), expected, check_stride=False)
    assert (logits(merged) - logits(base)).abs().max() > 0.1
    rounded = load_model(source, "bfloat16", CPU)
    for name, weight in merged.named_parameters():
        assert torch.equal(rounded.get_parameter(name), weight.to(torch.bfloat16))
    frequencies = "model.rotary_emb.inv_freq"
    assert torch.equal(rounded.get_buffer(frequencies), merged.get_buffer(frequencies))


def test_the_base_of_an_adapter_may_lie_beside_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "pruned", tmp_path / "moved" / "base")
    shutil.copytree(made / "adapter", tmp_path / "moved" / "adapter")
    config = json.loads((made / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "moved" / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "../base"})
    )
    source = find_model(str(tmp_path / "moved" / "adapter"))
    assert source.pretrained.folder.samefile(tmp_path / "moved" / "base")


def test_an_adapter_with_a_tokenizer_of_its_own_uses_it(made: Path, tmp_path: Path) -> None:
    assert find_model(str(made / "adapter")).tokenizer_folder == made / "dense"
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    make_tokenizer(97).save_pretrained(tmp_path / "adapter")
    assert find_model(str(tmp_path / "adapter")).tokenizer_folder == tmp_path / "adapter"


def test_dtype_is_the_models_own_unless_named(made: Path) -> None:
    source = find_model(str(made / "dense"))
    assert choose_dtype(source, None) == "float32"
    assert choose_dtype(source, "bfloat16") == "bfloat16"
    source.pretrained.config["dtype"] = "float8"
    with pytest.raises(UserError, match="is stored as float8; choose --dtype bfloat16, float16, float32"):
        choose_dtype(source, None)


# Bad input


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def change(name: str, **values: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def drop(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def cut_short(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("dense", cut_short("model.safetensors"), "{here}/model.safetensors is damaged: "),
    ("dense", drop("config.json"), "{here}/config.json does not exist"),
    ("dense", change("config.json", model_type="gpt2"), "{here}: model_type 'gpt2' is not supported"),
    ("dense", change("config.json", intermediate_size=47), "{here}/model.safetensors: model.layers.0.mlp.gate_proj"),
    ("run", change("status.json", state="running", step=3), "{here} holds an unfinished run (running at step 3 of 8)"),
    ("run", write("status.json", "{"), "{here}/status.json is not valid JSON"),
    ("run", drop("report.json"), "{here}/report.json does not exist"),
    ("run", write("report.json", '{"params": {}}'), "{here}/report.json is damaged: KeyError('"),
    ("run", drop("model/config.json"), "{here}/model/config.json does not exist"),
    ("adapter", drop("adapter_model.safetensors"), "{here}/adapter_model.safetensors does not exist"),
    ("adapter", change("adapter_config.json", peft_type="IA3"), "{here}/adapter_config.json: only LoRA can be merged"),
    (
        "adapter",
        change("adapter_config.json", base_model_name_or_path=None),
        "{here}/adapter_config.json names no base_model_name_or_path",
    ),
    (
        "adapter",
        change("adapter_config.json", base_model_name_or_path="/no/such/folder"),
        "base model of adapter {here}: folder /no/such/folder does not exist",
    ),
]


@pytest.mark.parametrize(("kind", "spoil", "message"), BAD)
def test_what_cannot_be_evaluated_is_one_line(
    made: Path, tmp_path: Path, kind: str, spoil: Callable[[Path], Any], message: str
) -> None:
    here = tmp_path / "spoilt"
    shutil.copytree(made / kind, here)
    spoil(here)
    with pytest.raises(UserError) as caught:
        find_model(str(here))
    assert str(caught.value).startswith(message.format(here=here))
    assert "\n" not in str(caught.value)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^folder {tmp_path}/nothing does not exist"):
        find_model(str(tmp_path / "nothing"))
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match=r"model\.bin is a file; a model is a folder or a hub id"):
        find_model(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("spoil", ["another base", "a missing tensor", "a damaged file"])
def test_an_adapter_that_does_not_fit_is_one_line(made: Path, tmp_path: Path, spoil: str) -> None:
    here = tmp_path / "adapter"
    shutil.copytree(made / "adapter", here)
    if spoil == "another base":
        change("adapter_config.json", base_model_name_or_path=str(made / "pruned"))(here)
    elif spoil == "a missing tensor":
        from safetensors.torch import load_file, save_file

        tensors = load_file(here / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        save_file(tensors, here / "adapter_model.safetensors")
    else:
        cut_short("adapter_model.safetensors")(here)
    with pytest.raises(UserError) as caught:
        load_model(find_model(str(here)), "float32", CPU)
    assert str(caught.value).startswith(f"adapter {here} does not fit its base model: ")
    assert "\n" not in str(caught.value)
