"""PEFT LoRA: the same start everywhere, no silent upcast, and an existing adapter taken over whole or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loraprune_ds.config import LoraConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.adapters import (
    ADAPTER,
    add_lora,
    check_adapter,
    load_adapter,
    lora_linear,
    lora_weights,
    set_features,
)
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.model.pretrained import open_pretrained
from tests.oracle.models import make_lora, make_tiny_llama

CONFIG = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0)
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "hidden": 24,
        "ffn": 37,
        "layers": LAYERS,
        "vocab": 59,
    }
    return make_tiny_llama(tmp_path_factory.mktemp("model"), seed=1, biases=True, **sizes)


def wrap(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, config: LoraConfig = CONFIG) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return add_lora(model, open_pretrained(folder).shape, config, seed)


def lora_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """Saves an adapter as PEFT itself does, with random factors."""
    model = wrap(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


# A fresh one


def test_lora_is_on_all_seven_linears_and_only_lora_is_trained(folder: Path) -> None:
    model = wrap(folder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_of(model))
    assert len(trained) == LAYERS * len(LLAMA_LINEARS) * 2
    for i, layer in enumerate(decoder_layers(model)):
        for linear in LLAMA_LINEARS:
            module = lora_linear(layer, linear)
            a, b = lora_weights(module)
            out_features, in_features = open_pretrained(folder).shape.linear_shape(i, linear)
            assert (a.shape, b.shape) == ((4, in_features), (out_features, 4))
            assert a.abs().max() > 0
            assert not b.any()
            assert module.scaling[ADAPTER] == 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapters_keep_the_models_dtype(folder: Path, dtype: torch.dtype) -> None:
    assert {tensor.dtype for tensor in lora_of(wrap(folder, dtype=dtype)).values()} == {dtype}


def test_the_start_depends_on_the_seed_alone(folder: Path) -> None:
    first = lora_of(wrap(folder, seed=3))
    torch.manual_seed(99)
    torch.rand(17)
    again, other = lora_of(wrap(folder, seed=3)), lora_of(wrap(folder, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_dropout_is_where_lora_is(folder: Path) -> None:
    model = wrap(folder, config=LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5)).train()
    input_ids = torch.arange(3, 20)[None]
    for layer in decoder_layers(model):
        for linear in LLAMA_LINEARS:
            nn.init.normal_(lora_weights(lora_linear(layer, linear))[1])
    first, second = (model(input_ids=input_ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(input_ids=input_ids).logits, model(input_ids=input_ids).logits)


def test_features_are_told_to_all_wrappers(folder: Path) -> None:
    module = lora_linear(decoder_layers(wrap(folder))[0], LLAMA_LINEARS[0])
    set_features(module, 12, 7)
    a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
    for holder in (module, module.base_layer):
        assert (holder.out_features, holder.in_features) == (12, 7)  # type: ignore[union-attr]
    assert (a.in_features, a.out_features, b.in_features, b.out_features) == (7, 4, 4, 12)


# An existing one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_taken_over(folder: Path, adapter: Path, dtype: torch.dtype) -> None:
    shape = open_pretrained(folder).shape
    check_adapter(adapter, CONFIG, shape)
    edit(adapter, target_modules=".*_proj")  # PEFT takes a pattern too
    check_adapter(adapter, CONFIG, shape)
    model = wrap(folder, dtype=dtype)
    load_adapter(model, adapter, shape, CONFIG.r)
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in lora_of(model).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, saved[name.replace(".default", "")].to(dtype)), name
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    if dtype == torch.float32:
        input_ids = torch.arange(3, 20)[None]
        assert torch.equal(model.eval()(input_ids=input_ids).logits, stock.eval()(input_ids=input_ids).logits)


def edit(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "is not a plain LoRA adapter"),
        ({"use_dora": True}, "is not a plain LoRA adapter"),
        ({"use_rslora": True}, "is not a plain LoRA adapter"),
        ({"alora_invocation_tokens": [1]}, "is not a plain LoRA adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4, which changes the base weights"),
        ({"bias": "all"}, "not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, "not supported"),
        ({"modules_to_save": ["lm_head"]}, "(modules_to_save), which is not supported"),
        ({"r": 8}, "has r 8; the run config says lora.r 4"),
        ({"lora_alpha": 16}, "has lora_alpha 16; the run config says lora.lora_alpha 6"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            "has no LoRA on down_proj, gate_proj, k_proj, o_proj, up_proj; the criterion needs it on all linears of a "
            "decoder layer",
        ),
        ({"target_modules": None}, "has no LoRA on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit(folder: Path, adapter: Path, values: dict[str, Any], message: str) -> None:
    edit(adapter, **values)
    with pytest.raises(UserError) as caught:
        check_adapter(adapter, CONFIG, open_pretrained(folder).shape)
    assert str(adapter) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def refused(folder: Path, adapter: Path) -> str:
    """Returns the line that refuses the header of its tensors."""
    with pytest.raises(UserError) as caught:
        check_adapter(adapter, CONFIG, open_pretrained(folder).shape)
    path = str(adapter / "adapter_model.safetensors")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(path)
    return str(caught.value).removeprefix(f"{path} ")


def test_missing_and_damaged_files(folder: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:-1], content[:50], b"", b"\0" * 100):
        weights.write_bytes(damaged)
        assert refused(folder, adapter).startswith("is damaged: ")
    weights.unlink()
    assert refused(folder, adapter) == "does not exist"
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json does not exist$"):
        check_adapter(adapter, CONFIG, open_pretrained(folder).shape)


def test_tensors_that_do_not_fit(folder: Path, adapter: Path) -> None:
    """An adapter of another model must be found as the input is checked, not when the model is loaded."""
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, weights)
    assert refused(folder, adapter) == f"does not fit the model: it lacks {name}"
    save_file(tensors | {name: tensors[name][:5].clone()}, weights)
    assert refused(folder, adapter) == f"does not fit the model: {name} has shape [5, 4], not [37, 4]"
    third = name.replace("layers.1", "layers.2")
    save_file(tensors | {third: tensors[name].clone()}, weights)
    assert refused(folder, adapter) == f"does not fit the model: it has {third}"


def test_the_oracles_adapter_has_the_names_of_peft(folder: Path) -> None:
    """The tests' own writer of adapters and the package speak of the same tensors."""
    names = {f"base_model.model.model.{name}.default.weight" for name in make_lora(folder, r=4, seed=1)}
    assert names == set(lora_of(wrap(folder)))
