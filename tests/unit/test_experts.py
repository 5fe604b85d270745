"""Stacks of experts against transformers' own experts: outputs, gradients, files, cuts, scores and merges."""

import json
import math
import shutil
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from loraprune_ds.config import LoraConfig, ModelConfig, PruneConfig
from loraprune_ds.errors import UserError
from loraprune_ds.export.formats import _adapter_config
from loraprune_ds.model.adapters import lora_linear, lora_weights
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.experts import as_in_peft
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.adapters import check_adapter, load_adapter
from loraprune_ds.pretrained.exported_config import export_config
from loraprune_ds.pretrained.pretrained import open_for_pruning, open_pretrained
from loraprune_ds.pretrained.read_shape import shape_from_config
from loraprune_ds.pruning.goal import make_goal
from tests.support.expert_factors import KINDS, TOLERANCE
from tests.support.families import tiny_model
from tests.support.family_cuts import (
    PROMPT,
    Network,
    dense,
    difference,
    draw,
    reopened,
    sparse_layers,
)
from tests.support.published import MIXTURES
from tests.support.refusals import must_name

# Tensors on disk that hold all experts of a layer.
IN_ONE = {"gpt_oss": 4, "granitemoe": 2, "gemma4_text": 2, "mistral4": 2}


def merged_stacks(network: Network) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns transformers' tensors of W + s·B·A, written once more, with the leaves A and B."""
    stacks = {}
    for i, layer in enumerate(decoder_layers(network.model)):
        for linear in (x for x in network.shape.layers[i].linears if x.stack):
            module: Any = layer.get_submodule(linear.linear)
            a, b = (factor.detach().clone().requires_grad_() for factor in lora_weights(module))
            weight, scaling = module.base_layer.weight.detach(), module.scaling["default"]
            experts, r = network.shape.counts[i]["experts"], b.shape[1]
            delta = [b.view(experts, -1, r)[e] @ a.view(experts, r, -1)[e] for e in range(experts)]
            whole = weight.view(experts, -1, weight.shape[1]) + scaling * torch.stack(delta)
            stacks[f"model.layers.{i}.{linear.linear}_proj"] = (whole, a, b)
    return stacks


@pytest.mark.parametrize("family", KINDS)
def test_outputs_and_gradients_are_those_of_stock_experts(family: str) -> None:
    network, stock = dense(family, dtype=torch.float64), tiny_model(family, dtype=torch.float64)
    stacks, merged = merged_stacks(network), dict[str, Tensor]()
    for i, linear in network.shape.linears():
        if not linear.stack:
            module: Any = lora_linear(decoder_layers(network.model)[i], linear.linear)
            delta = module.get_delta_weight("default")
            merged[f"model.layers.{i}.{linear.name}"] = (module.base_layer.weight + delta).detach()
    merged |= {name: whole for name, (whole, _, _) in stacks.items()}
    wanted: Tensor = functional_call(
        stock, merged, kwargs={"input_ids": PROMPT, "use_cache": False}
    ).logits
    found = network.model(input_ids=PROMPT, use_cache=False).logits
    assert difference(found.detach(), wanted.detach()) < TOLERANCE
    for logits in (wanted, found):
        logits.square().mean().backward()
    for name, (_, *leaves) in stacks.items():
        path = name.removesuffix("_proj")
        module: Any = network.model.get_base_model().get_submodule(path)
        for factor, leaf in zip(lora_weights(module), leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(
                factor.grad, leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max())
            )


def saved(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", KINDS)
def test_experts_are_read_from_the_files_of_transformers(family: str, tmp_path: Path) -> None:
    """Each expert has its own matrices there. Any flat part of a stack comes from several of them."""
    stock, pretrained = saved(family, tmp_path), open_pretrained(tmp_path)
    sparse, of_expert = sparse_layers(pretrained.shape), 2 if family == "nemotron_h" else 3
    of_layer = IN_ONE.get(family, 23 * of_expert)
    assert sum(".experts." in name for name in pretrained.weights.files) == len(sparse) * of_layer
    with torch.no_grad():
        found = reopened(pretrained)(input_ids=PROMPT, use_cache=False).logits
        assert difference(found, stock(input_ids=PROMPT, use_cache=False).logits) < TOLERANCE
    stack = next(
        linear.linear for linear in pretrained.shape.layers[sparse[-1]].linears if linear.stack
    )
    name = f"model.layers.{sparse[-1]}.{stack}.weight"
    whole = stock.get_parameter(f"model.layers.{sparse[-1]}.{stack}_proj").detach().flatten()
    for world_size in (1, 2, 3, 7, 64):
        step = -(-len(whole) // world_size)
        bounds = [min(rank * step, len(whole)) for rank in range(world_size + 1)]
        parts = [
            pretrained.weights.read_flat(name, a, b, torch.float32) for a, b in pairwise(bounds)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_experts_in_one_tensor_are_read_like_separate_ones(tmp_path: Path) -> None:
    """As Qwen3.5 is published, with a layer for one more token beside. The export says that this is gone."""
    apart, together = tmp_path / "apart", tmp_path / "together"
    stock = saved("qwen3_5_moe_text", apart, mtp_num_hidden_layers=1)
    shutil.copytree(apart, together)
    tensors = {
        n: x for n, x in load_file(apart / "model.safetensors").items() if ".experts." not in n
    }
    tensors |= {n: x.detach() for n, x in stock.named_parameters() if ".experts." in n}
    save_file(
        tensors | {"mtp.fc.weight": torch.zeros(2)},
        together / "model.safetensors",
        metadata={"format": "pt"},
    )
    source, other = open_pretrained(apart), open_pretrained(together)
    assert other.shape == source.shape
    keep = draw(source.shape, (3, 13), (4, 14))
    wanted, found = source.weights.cut(keep), other.weights.cut(keep)
    for name in wanted.shape.parameters():
        assert torch.equal(
            found.read_full(name, torch.float32), wanted.read_full(name, torch.float32)
        ), name
    assert export_config(other.config, found.shape, "float32").config["mtp_num_hidden_layers"] == 0


def test_four_bit_experts_are_refused_with_what_to_do(tmp_path: Path) -> None:
    """As GPT-OSS is published. transformers makes a bf16 model of it, which a run takes."""
    saved("gpt_oss", tmp_path)
    file, name = tmp_path / "model.safetensors", "model.layers.0.mlp.experts.down_proj"
    tensors = load_file(file)
    tensors |= {
        f"{name}_{part}": torch.zeros(23, 60, 2, dtype=torch.uint8) for part in ("blocks", "scales")
    }
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    must_name(f"{name}_blocks MXFP4 Mxfp4Config", open_pretrained, tmp_path)


@pytest.mark.parametrize("family", KINDS)
def test_a_token_keeps_as_many_experts_as_it_chooses(family: str) -> None:
    shape = dense(family).shape
    config = PruneConfig(ratio=0.1, protected_first=0, protected_last=0, channel_multiple=1)
    goal = make_goal(config, shape)
    limits = goal.limits
    assert all(limits.floor[i]["experts"] == 3 for i in sparse_layers(shape))
    heads = (
        (shape.counts[1]["heads"] if "heads" in shape.family.fixed else 1)
        if "heads" in shape.kinds
        else None
    )
    assert limits.floor[1].get("heads") == heads
    assert {kind for kind, numel in goal.leaving.items() if numel} == {"experts"}


@pytest.mark.parametrize(
    ("family", "changes", "packing", "reason"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, False, "router_jitter_noise"),
        # It makes its masks without positions. tests/unit/test_data_packing.py shows the others.
        ("gpt_oss", {}, True, "data.packing"),
        ("gpt_oss", {}, False, None),
        ("qwen3_5_moe_text", {}, True, "data.packing"),
    ],
)
def test_a_run_that_a_mixture_cannot_do_is_refused(
    family: str, changes: dict[str, Any], packing: bool, reason: str | None, tmp_path: Path
) -> None:
    saved(family, tmp_path, **changes)
    with pytest.raises(UserError, match=reason) if reason else nullcontext():
        open_for_pruning(tmp_path, ModelConfig(), packing=packing)


def test_a_refit_is_chosen_where_heads_or_channels_leave() -> None:
    def resolved(family: str, **prune: Any) -> str | None:
        config, shape = (
            PruneConfig(ratio=0.3, channel_multiple=1, protected_first=0, **prune),
            dense(family).shape,
        )
        return make_goal(config, shape).config.compensate

    assert (resolved("llama"), resolved("mixtral")) == ("least_squares", "none")
    assert resolved("mixtral", head_ratio=0.2) == "least_squares"
    # Nothing to refit is no error, so that one config serves all models. A resume finds what was given.
    assert resolved("mixtral", compensate="least_squares") == "least_squares"


@pytest.mark.parametrize("family", KINDS)
def test_stock_peft_loads_the_adapter(family: str, tmp_path: Path) -> None:
    network = dense(family)
    tensors: dict[str, Tensor] = {}
    for i, layer in enumerate(decoder_layers(network.model)):
        linears = network.shape.layers[i].linears
        pairs = ((x.linear, lora_weights(lora_linear(layer, x.linear))) for x in linears)
        own = {
            f"{name}.lora_{x}": f.detach()
            for name, pair in pairs
            for x, f in zip("AB", pair, strict=True)
        }
        for name, factor in as_in_peft(own, linears).items():
            tensors[f"base_model.model.model.layers.{i}.{name}.weight"] = factor
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _adapter_config(3, 16, 0.05, network.shape)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = PeftModel.from_pretrained(tiny_model(family), str(tmp_path)).eval()
    with torch.no_grad():
        found = loaded(input_ids=PROMPT, use_cache=False).logits
    assert difference(found, network.logits()) < TOLERANCE
    check_adapter(tmp_path, LoraConfig(r=3), network.shape)
    again = dense(family)
    for name, factor in again.model.named_parameters():
        if "lora_" in name:
            nn.init.zeros_(factor)
    load_adapter(again.model, tmp_path, network.shape, 3)
    assert torch.equal(again.logits(), network.logits())
    linears = {f".{linear.linear}." for _, linear in network.shape.linears() if not linear.spans}
    if whole := [name for name in tensors if any(part in name for part in linears)]:
        save_file(
            {n: x for n, x in tensors.items() if n not in whole},
            tmp_path / "adapter_model.safetensors",
        )
        # whole linears begin with fresh LoRA
        check_adapter(tmp_path, LoraConfig(r=3), network.shape)
        load_adapter(again.model, tmp_path, network.shape, 3)
        save_file(
            {n: x for n, x in tensors.items() if n != whole[1]},
            tmp_path / "adapter_model.safetensors",
        )
        must_name("lora_B", check_adapter, tmp_path, LoraConfig(r=3), network.shape)


def test_an_adapter_without_lora_on_experts_is_refused(tmp_path: Path) -> None:
    shape = dense("mixtral").shape
    config = _adapter_config(3, 16, 0.05, shape) | {"target_parameters": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    must_name("down_proj gate_up_proj", check_adapter, tmp_path, LoraConfig(r=3), shape)


def active_numel(shape: ModelShape) -> int:
    """Counts the linear parameters that one token uses. Of the experts these are only the chosen ones."""
    tensors = [tensor for layer in shape.layers for tensor in layer.tensors]
    # a matrix without groups, such as Mamba's out_proj, may lack LoRA
    used = [x for x in tensors if x.lora or (len(x.shape) > 1 and not x.spans)]
    numel = sum(tensor.numel for tensor in used)
    assert shape.mixture
    for counts in shape.counts:
        idle = max(0, counts["experts"] - shape.mixture.experts_per_token)
        numel -= idle * shape.group_numel["experts"]
    return numel


@pytest.mark.parametrize("name", MIXTURES)
def test_published_mixtures_have_the_parameters_that_are_published(name: str) -> None:
    source, billions, active = MIXTURES[name]
    shape = shape_from_config(source, name)
    assert shape.total_numel() / 1e9 == pytest.approx(billions, rel=0.003)
    others = {
        name: n for name, n in shape.parameters().items() if ".layers." not in name or len(n) < 2
    }
    routers = shape.hidden_size * sum(layer["experts"] for layer in shape.counts)
    met = active_numel(shape) + routers + sum(math.prod(size) for size in others.values())
    assert met / 1e9 == pytest.approx(active, rel=0.02)
