"""Stacks of experts against transformers' own experts: outputs, gradients, files, cuts, scores and merges."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from loraprune_ds.config import PruneConfig, RunConfig
from loraprune_ds.errors import UserError
from loraprune_ds.export.lora import merge_lora
from loraprune_ds.model.adapters import lora_linear, lora_weights
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.pretrained import cut_to, open_for_pruning, open_pretrained
from loraprune_ds.pruning.criterion import ELEMENT_CRITERIA, score_shard, split_experts
from loraprune_ds.pruning.expert_norms import ExpertNorms
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.mask_gradients import MaskGradients
from loraprune_ds.pruning.prunable_model import LoraFactors, OwnedShard
from tests.families import tiny_model
from tests.family_cuts import PROMPT, Network, dense, difference, draw, reopened
from tests.oracle.models import make_batches
from tests.plain_model import PlainModel
from tests.unit.plain_training import PlainRun

MIXTURES = ("mixtral", "qwen3_moe")
TOLERANCE = 1e-5  # sums in another order, some 1e-7 each; a wrong expert moves the logits by about 1


def merged_stacks(network: Network) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Returns transformers' tensors of W + s·B·A, written once more, with the leaves A and B."""
    stacks = {}
    for i, layer in enumerate(decoder_layers(network.model)):
        for ours, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            module: Any = layer.get_submodule(f"mlp.experts.{ours}")
            a, b = (factor.detach().clone().requires_grad_() for factor in lora_weights(module))
            weight, scaling = module.base_layer.weight.detach(), module.scaling["default"]
            experts, r = network.shape.layers[i]["experts"], b.shape[1]
            delta = [b.view(experts, -1, r)[e] @ a.view(experts, r, -1)[e] for e in range(experts)]
            whole = weight.view(experts, -1, weight.shape[1]) + scaling * torch.stack(delta)
            stacks[f"model.layers.{i}.mlp.experts.{theirs}"] = (whole, a, b)
    return stacks


@pytest.mark.parametrize("family", MIXTURES)
def test_outputs_and_gradients_are_those_of_stock_experts(family: str) -> None:
    network, stock = dense(family), tiny_model(family)
    stacks = merged_stacks(network)
    attention = {
        f"model.layers.{i}.{linear.name}.weight": lora_linear(layer, linear)
        for i, layer in enumerate(decoder_layers(network.model))
        for linear in network.shape.linears
        if not linear.is_stack
    }
    merged: dict[str, Tensor] = {}
    for name, module in attention.items():
        weight: Any = module.base_layer.weight
        merged[name] = (weight + module.get_delta_weight("default")).detach()
    merged |= {name: whole for name, (whole, _, _) in stacks.items()}
    wanted: Tensor = functional_call(stock, merged, kwargs={"input_ids": PROMPT, "use_cache": False}).logits
    found = network.model(input_ids=PROMPT, use_cache=False).logits
    assert difference(found.detach(), wanted.detach()) < TOLERANCE
    for logits in (wanted, found):
        logits.square().mean().backward()
    for name, (_, *leaves) in stacks.items():
        path = name.removesuffix("_proj")
        module: Any = network.model.get_base_model().get_submodule(path)
        for factor, leaf in zip(lora_weights(module), leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(factor.grad, leaf.grad, rtol=1e-4, atol=1e-5 * float(leaf.grad.abs().max()))


def saved(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_read_from_the_files_of_transformers(family: str, tmp_path: Path) -> None:
    """Each expert has its own matrices there. Any flat part of a stack comes from several of them."""
    stock, pretrained = saved(family, tmp_path), open_pretrained(tmp_path)
    assert sum(".experts." in name for name in pretrained.files) == 2 * 23 * 3
    with torch.no_grad():
        found = reopened(pretrained)(input_ids=PROMPT, use_cache=False).logits
        assert difference(found, stock(input_ids=PROMPT, use_cache=False).logits) < TOLERANCE
    name = "model.layers.1.mlp.experts.gate_up.weight"
    whole = stock.get_parameter("model.layers.1.mlp.experts.gate_up_proj").detach().flatten()
    for world_size in (1, 2, 3, 7, 64):
        step = -(-len(whole) // world_size)
        parts = [
            pretrained.read_flat(name, min(s, len(whole)), min(s + step, len(whole)), torch.float32)
            for s in range(0, world_size * step, step)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_cut_model_is_read_from_the_dense_files(family: str, tmp_path: Path) -> None:
    """As a resumed run does. It is what the live cut leaves, bit by bit."""
    saved(family, tmp_path)
    network = dense(family)
    keep = draw(network.shape, (3, 13), (4, 14))
    network.cut(keep)
    left = cut_to(open_pretrained(tmp_path), keep, "float32")
    live = dict(network.model.get_base_model().named_parameters())
    for name, size in left.shape.parameters().items():
        found = left.read_flat(name, 0, torch.Size(size).numel(), torch.float32).view(size)
        path, _, last = name.rpartition(".")
        assert torch.equal(found, live[name if name in live else f"{path}.base_layer.{last}"]), name


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path, num_experts=4)
    config = (tmp_path / "config.json").read_text()
    assert '"num_local_experts": 4' in config
    (tmp_path / "config.json").write_text(config.replace('"num_local_experts": 4', '"num_experts": 5'))
    with pytest.raises(UserError, match=r"mlp\.gate\.weight has shape \[4, 60\]; config\.json says \[5, 60\]"):
        open_pretrained(tmp_path)


def factors(experts: int, rows: int, columns: int, r: int) -> LoraFactors:
    generator = torch.Generator().manual_seed(4)
    sizes = ((experts * r, columns), (experts * rows, r)) * 2
    return LoraFactors(*(torch.randn(size, generator=generator) for size in sizes), scaling=2.0)


def test_shards_of_a_stack_score_as_the_experts_do() -> None:
    experts, rows, columns, r = 5, 6, 7, 3
    whole, lora = torch.randn(experts * rows, columns, generator=torch.Generator().manual_seed(3)), factors(5, 6, 7, 3)
    wanted = []
    for e in range(experts):
        a, ga = (f.view(experts, r, columns)[e] for f in (lora.A, lora.grad_A))
        b, gb = (f.view(experts, rows, r)[e] for f in (lora.B, lora.grad_B))
        weight = whole.view(experts, rows, columns)[e] + 2.0 * b @ a
        wanted.append(((gb @ a + b @ ga - gb @ ga) * weight).abs().sum(1))
    for world_size in (1, 2, 3, 4):
        total, flat = torch.zeros(experts * rows, dtype=torch.float64), whole.flatten()
        size = -(-len(flat) // world_size)
        for start in range(0, len(flat), size):
            shard = OwnedShard(flat[start : start + size], start, (experts * rows, columns))
            total += torch.cat([score_shard(s, f, ELEMENT_CRITERIA["lora"], 0) for s, f in split_experts(shard, lora)])
        torch.testing.assert_close(total.float(), torch.cat(wanted))


def test_a_stack_merges_expert_by_expert() -> None:
    lora, whole = factors(5, 6, 7, 3), torch.randn(30, 7, generator=torch.Generator().manual_seed(3))
    found = merge_lora(whole, lora.A, lora.B, 2.0, torch.float32)
    for e in range(5):
        rows, of_a = slice(6 * e, 6 * e + 6), slice(3 * e, 3 * e + 3)
        torch.testing.assert_close(found[rows], whole[rows] + 2.0 * lora.B[rows] @ lora.A[of_a])


@pytest.mark.parametrize("family", MIXTURES)
def test_a_token_keeps_as_many_experts_as_it_chooses(family: str) -> None:
    shape = dense(family).shape
    config = PruneConfig(ratio=0.5, protected_first=0, protected_last=0, channel_multiple=1)
    limits = make_limits(config, shape)
    assert limits.floor[0]["experts"] == 3
    assert limits.shares == {"heads": 0, "experts": 1}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "frozen", "int8"), ("prune", "criterion", "gradient"), ("prune", "compensate", "least_squares")],
)
def test_what_stacks_do_not_have_is_refused_by_name(section: str, key: str, value: str, tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    config = RunConfig("unused")
    config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    with pytest.raises(UserError, match=f"{section}.{key}: {value} is not supported for mixtures of experts"):
        open_for_pruning(tmp_path, config)


@pytest.mark.parametrize("criterion", ["lora", "lora_squared", "fisher", "reap"])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_do_nothing_go_first(family: str, criterion: str, tmp_path: Path) -> None:
    """Their last linear is zero, and so is what LoRA adds at the first step."""
    useless = {0: [1, 5, 6, 20], 1: [0, 2, 11, 22]}
    model = tiny_model(family)
    with torch.no_grad():
        for i, experts in useless.items():
            model.get_parameter(f"model.layers.{i}.mlp.experts.down_proj")[experts] = 0
    model.save_pretrained(tmp_path)
    shape = open_pretrained(tmp_path).shape
    lora: dict[str, Tensor] = {}
    for i in range(len(shape.layers)):
        for linear in shape.linears:
            a, b = shape.lora_shapes(i, linear, 2)
            lora[f"layers.{i}.{linear.name}.lora_A"] = torch.randn(a, generator=torch.Generator().manual_seed(i))
            lora[f"layers.{i}.{linear.name}.lora_B"] = torch.zeros(b)
    prune: dict[str, Any] = {"ratio": 4 / 23 * 0.75, "prune_every": 1, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
    config = PruneConfig(**prune, protected_first=0, protected_last=0, criterion=cast(Any, criterion))
    run = PlainRun(tmp_path, lora, config, 1)
    run.run(make_batches(steps=1, samples=12, tokens=16, vocab=97, seed=3))
    for i, experts in useless.items():
        gone = set(range(23)) - set(run.pruner.kept_of_dense[i]["experts"].tolist())
        assert set(experts) <= gone
        assert len(gone) == 5


@pytest.mark.parametrize("family", MIXTURES)
def test_fisher_is_the_gradient_of_a_mask_on_each_experts_output(family: str) -> None:
    """A mask is put on every token and expert, and autograd gives its gradient."""
    network, masks = dense(family), dict[int, Tensor]()
    recorder = MaskGradients(cast(Any, PlainModel(network.model, network.shape)))

    def masked(layer: int) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, list[int]], output: Tensor) -> Tensor:
            masks[layer] = torch.ones(len(output), 1, requires_grad=True)
            return output * masks[layer]

        return hook

    counts = []
    for i, layer in enumerate(decoder_layers(network.model)):
        down = layer.get_submodule("mlp.experts.down")
        down.register_forward_hook(masked(i))
        down.register_forward_pre_hook(lambda module, inputs: counts.append(inputs[1]))
    with recorder.record():
        network.model(input_ids=PROMPT, use_cache=False).logits.square().mean().backward()
        sums = recorder.sums()
    for i in range(len(network.shape.layers)):
        grad = masks[i].grad
        assert grad is not None
        wanted = torch.stack([part.square().sum() for part in grad.split(counts[i])])
        torch.testing.assert_close(sums[2 * i + 1].float(), wanted)  # attention, then experts, of each layer


@pytest.mark.parametrize("family", MIXTURES)
def test_reap_is_the_mean_of_router_weight_times_output_norm(family: str) -> None:
    """Every expert computes every token here. What the router did not choose does not count, nor does padding."""
    network, stacks = dense(family), list(merged_stacks(dense(family)).values())
    recorder = ExpertNorms(cast(Any, PlainModel(network.model, network.shape)))
    routed: list[Any] = []
    for layer in decoder_layers(network.model):
        layer.get_submodule("mlp").register_forward_pre_hook(lambda module, inputs: routed.append(inputs[0]))
        layer.get_submodule("mlp.gate").register_forward_hook(lambda module, inputs, output: routed.append(output))
    real = torch.ones_like(PROMPT, dtype=torch.bool)
    real[1, 10:] = False
    with recorder.record():
        for _ in range(2):  # as two micro-batches
            with recorder.record_forward(real):
                network.model(input_ids=PROMPT, use_cache=False)
        network.model(input_ids=PROMPT, use_cache=False)  # nobody looks
        found = recorder.scores(1).by_layer("none")
    for i, layer in enumerate(found):
        hidden, (_, weights, chosen) = routed[2 * i].flatten(0, 1), routed[2 * i + 1]
        gate_up, down = stacks[2 * i][0], stacks[2 * i + 1][0]
        wanted = torch.zeros(23)
        for e in range(23):
            gate, up = (hidden @ gate_up[e].T).chunk(2, 1)
            norms = (torch.nn.functional.silu(gate) * up @ down[e].T).norm(dim=1)
            picked = (chosen == e) & real.flatten()[:, None]
            wanted[e] = (norms[:, None] * weights)[picked].sum() / picked.sum().clamp(min=1)
        torch.testing.assert_close(layer["experts"].float(), wanted)
        assert not layer["heads"].any()
