"""Tests the modelling file we ship, and the claim they rest on: a cut model computes the same as the masked one."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from loraprune_ds.model.classes import causal_lm_class, config_class
from tests.export_cases import CASES, VOCAB, Case, cut, dense_model, exported_config, mask

PROMPT = torch.arange(24).view(2, 12) * 7 % VOCAB
PRUNED = [case for case in CASES if case.becomes.startswith("pruned_")]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float32"], ids=str)
def test_masked_equals_cut(case: Case) -> None:
    model = dense_model(case)
    with torch.no_grad():
        smaller = cut(model, case)(PROMPT).logits
        full = model(PROMPT).logits
        mask(model, case)
        masked = model(PROMPT).logits
    # The masked sums are as long as the dense model's. They add in another order: some ulps (2e-7 at 2) per layer.
    torch.testing.assert_close(smaller, masked, rtol=0, atol=1e-5)
    assert (full - masked).abs().max() > 0.1  # the removed groups mattered


def build(case: Case, device: str = "cpu") -> PreTrainedModel:
    exported, _, _ = exported_config(dense_model(case), case)
    with torch.device(device):
        return causal_lm_class(case.becomes)(config_class(case.becomes).from_dict(exported.config))


def filled(case: Case) -> PreTrainedModel:
    """Builds the shipped class with the cut model's weights."""
    model = build(case)
    model.load_state_dict(cut(dense_model(case), case).state_dict())
    return model


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_born_on_meta_at_the_right_sizes(case: Case) -> None:
    model = build(case, "meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    expected = {name: parameter.shape for name, parameter in cut(dense_model(case), case).named_parameters()}
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == expected


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # renamed, and still in 5.x
@pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_lora_and_gradient_checkpointing(case: Case) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(filled(case), LoraConfig(r=2, target_modules=LINEARS, task_type="CAUSAL_LM"))
        base = model.get_base_model()
        assert isinstance(base, PreTrainedModel)
        layer_calls = []
        for layer in base.get_submodule("model.layers").children():
            # The hook is on the MLP: transformers checkpoints a layer's forward inside the layer's own hooks.
            layer.get_submodule("mlp").register_forward_pre_hook(lambda *_, calls=layer_calls: calls.append(1))
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(PROMPT, labels=PROMPT).loss.backward()
        passes = 2 if checkpointing else 1  # a checkpointed layer runs again in backward
        assert len(layer_calls) == passes * len(case.keep)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert len(plain) == 2 * len(LINEARS) * len(case.keep)
    for name, gradient in plain.items():
        assert gradient is not None
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)
    assert all(gradient.abs().sum() > 0 for name, gradient in plain.items() if "lora_B" in name)


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_attention_implementation_can_be_changed_on_the_model(case: Case) -> None:
    """Each layer has a config of its own. One that kept the old implementation would get the mask of the new one."""
    model = filled(case).float().eval()
    logits = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        for layer in model.get_submodule("model.layers").children():
            attention: Any = layer.get_submodule("self_attn")
            assert attention.config._attn_implementation == implementation
        with torch.no_grad():
            logits.append(model(PROMPT).logits)
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
