"""PEFT LoRA: the same start everywhere, no silent upcast, and an existing adapter taken over whole or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loraprune_ds.config import LoraConfig
from loraprune_ds.model import adapters
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.shape import LinearId
from tests.families import LLAMA_LINEARS
from tests.oracle.models import make_lora, make_tiny_llama
from tests.refusals import edit, must_name, truncate

CONFIG = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.0)
LAYERS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"), ffn=37, layers=LAYERS, biases=True)


def wrap(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, config: LoraConfig = CONFIG) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return adapters.add_lora(model, open_pretrained(folder).shape, config, seed)


def lora_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.fixture
def adapter(folder: Path, tmp_path: Path) -> Path:
    """Saves an adapter with PEFT, with random factors."""
    model = wrap(folder, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).bfloat16()
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_is_on_all_seven_linears_and_only_lora_is_trained(folder: Path, dtype: torch.dtype) -> None:
    model = wrap(folder, dtype=dtype, config=LoraConfig(r=4, lora_alpha=6, lora_dropout=0.5))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(lora_of(model))
    assert len(trained) == LAYERS * len(LLAMA_LINEARS) * 2
    assert {tensor.dtype for tensor in lora_of(model).values()} == {dtype}
    shape = open_pretrained(folder).shape
    for i, layer in enumerate(decoder_layers(model)):
        for linear in LLAMA_LINEARS:
            module = adapters.lora_linear(layer, linear.name)
            a, b = adapters.lora_weights(module)
            out_features, in_features = shape.linear(LinearId(i, linear.name)).matrix
            assert (a.shape, b.shape) == ((4, in_features), (out_features, 4))
            assert a.abs().max() > 0
            assert not b.any()
            assert module.scaling[adapters.ADAPTER] == 1.5
            assert module.lora_dropout[adapters.ADAPTER].p == 0.5
    # The tests' own writer of adapters uses the same names.
    assert {f"base_model.model.model.{name}.default.weight" for name in make_lora(folder, r=4, seed=1)} == trained


def test_the_start_depends_on_the_seed_alone(folder: Path) -> None:
    first = lora_of(wrap(folder, seed=3))
    torch.manual_seed(99)
    again, other = lora_of(wrap(folder, seed=3)), lora_of(wrap(folder, seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_existing_adapter_is_loaded(folder: Path, adapter: Path, dtype: torch.dtype) -> None:
    shape = open_pretrained(folder).shape
    adapters.check_adapter(adapter, CONFIG, shape)
    edit("adapter_config.json", target_modules=".*_proj")(adapter)  # PEFT takes a pattern too
    adapters.check_adapter(adapter, CONFIG, shape)
    model = wrap(folder, dtype=dtype)
    adapters.load_adapter(model, adapter, shape, CONFIG.r)
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in lora_of(model).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, saved[name.replace(".default", "")].to(dtype)), name
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    if dtype == torch.float32:
        input_ids = torch.arange(3, 20)[None]
        assert torch.equal(model.eval()(input_ids=input_ids).logits, stock.eval()(input_ids=input_ids).logits)


def check(folder: Path, adapter: Path, names: str) -> None:
    must_name(f"{adapter} {names}", adapters.check_adapter, adapter, CONFIG, open_pretrained(folder).shape)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"peft_type": "IA3"}, "LoRA"),
        ({"use_rslora": True}, "LoRA"),
        ({"alora_invocation_tokens": [1]}, "LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4"),
        ({"bias": "all"}, "biases"),
        ({"rank_pattern": {"q_proj": 2}}, "ranks"),
        ({"alpha_pattern": {"q_proj": 2}}, "alphas"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 8}, "lora.r 8 4"),
        ({"lora_alpha": 16}, "lora.lora_alpha 16 6"),
        ({"target_modules": ["q_proj", "v_proj"]}, "down_proj, gate_proj, k_proj, o_proj, up_proj"),
        ({"target_modules": None}, "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(folder: Path, adapter: Path, values: dict[str, Any], names: str) -> None:
    edit("adapter_config.json", **values)(adapter)
    check(folder, adapter, names)


def test_missing_and_damaged_files(folder: Path, adapter: Path) -> None:
    truncate("adapter_model.safetensors", -1)(adapter)
    check(folder, adapter, "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (adapter / name).unlink()
        check(folder, adapter, name)


def test_tensors_that_do_not_fit(folder: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    third = name.replace("layers.1", "layers.2")
    for found, names in (
        ({key: tensor for key, tensor in tensors.items() if key != name}, name),
        (tensors | {name: tensors[name][:5].clone()}, f"{name} [5, 4] [37, 4]"),
        (tensors | {third: tensors[name].clone()}, third),
    ):
        save_file(found, weights)
        check(folder, adapter, names)
