"""A refit repeats passes layer by layer. It must see what an ordinary forward pass shows."""

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import RunError
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.adapters import lora_linear
from loraprune_ds.model.groups import LayerKeep
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.compensate import measured_linears, refit
from loraprune_ds.pruning.passes import KeptPasses
from loraprune_ds.pruning.prunable_model import CollectedLinear, hook_inputs
from loraprune_ds.pruning.replay import refit_by_replay
from loraprune_ds.session.live import live_shape
from tests.oracle.models import make_batches, make_tiny_llama
from tests.support.families import TINY, is_seq2seq, tiny_model
from tests.support.family_cuts import FEW, dense, draw
from tests.support.plain_training import PlainRun, fresh_lora

Batch = tuple[dict[str, Tensor], tuple[Tensor | None, ...]]


def batches(family: str) -> list[Batch]:
    """Draws two micro-batches. The second has padding."""
    generator = torch.Generator().manual_seed(7)
    drawn: list[Batch] = []
    for length in (17, 11):
        ids = torch.randint(3, 60, (2, 17), generator=generator)
        mask = torch.arange(17) < torch.tensor([[17], [length]])
        inputs = {"input_ids": ids}
        masks: tuple[Tensor | None, ...] = (mask,)
        if is_seq2seq(family):
            inputs |= {"attention_mask": mask, "decoder_input_ids": ids[:, :5]}
            masks = (mask, None)
        drawn.append((inputs, masks))
    return drawn


def run(model: LocalModel, inputs: dict[str, Any]) -> Any:
    """Makes a forward pass: of the encoder alone without a target."""
    module: Any = model.module
    if model.shape.family.has_encoder and "decoder_input_ids" not in inputs:
        module = module.get_base_model().get_encoder()
    return module(**inputs)


@torch.no_grad()
def refit_from_ordinary_passes(model: LocalModel, keep: list[LayerKeep], of: list[Batch]) -> None:
    """Refits by moments that hooks on all linears gather in whole forward passes."""
    moments: dict[LinearId, Tensor] = {}
    masks: list[tuple[Tensor | None, ...]] = []
    shrinking = {
        LinearId(i, linear.linear): linear
        for i, linear in measured_linears(model.shape)
        if linear.shrinks(keep[i])
    }

    def see(key: LinearId, inputs: Tensor) -> None:
        mask = masks[-1][model.shape.layers[key.layer].layer_list]
        rows = inputs.flatten(0, 1) if mask is None else inputs[mask]
        rows = rows.float()
        with torch.autocast("cpu", enabled=False):
            moments[key] = moments.get(key, torch.zeros(())) + rows.T @ rows

    remove = hook_inputs(model, [(key.layer, linear) for key, linear in shrinking.items()], see)
    for inputs, of_batch in of:
        masks.append(of_batch)
        run(model, inputs)
    remove()

    def compute(key: LinearId, linear: CollectedLinear) -> Tensor:
        return refit(linear, moments[key], shrinking[key].kept_indices(keep[key.layer]))

    model.replace_weights(list(shrinking), compute)


def base_weights(model: LocalModel) -> dict[LinearId, Tensor]:
    weights: dict[LinearId, Tensor] = {}
    for i, linear in measured_linears(model.shape):
        module: Any = lora_linear(model.layers[i], linear.linear)
        weights[LinearId(i, linear.linear)] = module.base_layer.weight.detach().clone()
    return weights


def live(family: str) -> LocalModel:
    network = dense(family)
    return LocalModel(network.model, network.shape)


def replay(model: LocalModel, keep: list[LayerKeep], of: list[Batch]) -> None:
    """Makes training passes, whose dropout they do not repeat, and refits by repeating them."""
    kept = KeptPasses(model)
    kept.begin_step()
    model.module.train()
    for inputs, masks in of:
        with kept.record_forward(*masks):
            output = run(model, inputs)
        output[0].sum().backward()
    refit_by_replay(model, keep, kept.passes(), step=7)
    assert all(part.training for part in model.module.modules())


def assert_same_refit(
    family: str, model: LocalModel, expected_model: LocalModel, keep: list[LayerKeep]
) -> None:
    """Compares two models that were refitted."""
    before = base_weights(live(family))
    replayed = base_weights(model)
    expected = base_weights(expected_model)
    shrinking = {
        LinearId(i, x.linear) for i, x in measured_linears(model.shape) if x.shrinks(keep[i])
    }
    assert {key for key in before if not torch.equal(before[key], expected[key])} == shrinking
    for key, weight in expected.items():
        # both sum in fp32, in another order, which the inverse enlarges
        torch.testing.assert_close(replayed[key], weight, rtol=1e-4, atol=1e-5, msg=str(key))


@pytest.mark.parametrize("family", TINY)
def test_a_replay_refits_like_moments_of_ordinary_forward_passes(family: str) -> None:
    model = live(family)
    expected = live(family)
    keep = draw(model.shape, FEW)
    replay(model, keep, batches(family))
    refit_from_ordinary_passes(expected, keep, batches(family))
    assert_same_refit(family, model, expected, keep)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_so_it_does_in_the_precision_of_the_passes(family: str) -> None:
    model = live(family)
    expected = live(family)
    keep = draw(model.shape, FEW)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refit_from_ordinary_passes(expected, keep, batches(family))
    kept = KeptPasses(model)
    kept.begin_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs, masks in batches(family):
            with kept.record_forward(*masks):
                loss = model.module(**inputs)[0].sum()
            loss.backward()
    refit_by_replay(model, keep, kept.passes(), step=7)
    assert_same_refit(family, model, expected, keep)


def test_a_refit_leaves_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 5.25 on, transformers replaces them when a model changes its mode."""
    model = live("llama")
    model.module.train()
    kept = KeptPasses(model)
    kept.begin_step()
    for inputs, masks in batches("llama"):
        with kept.record_forward(*masks):
            loss = model.module(**inputs)[0].sum()
        loss.backward()
    monkeypatch.setattr(PreTrainedModel, "train", Mock(side_effect=AssertionError))
    refit_by_replay(model, draw(model.shape, FEW), kept.passes(), step=7)


class Casts(TorchDispatchMode):
    """Counts the casts of each tensor, by its id."""

    def __init__(self) -> None:
        super().__init__()
        self.times = Counter[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.times[id(args[0])] += 1
        return func(*args, **(kwargs or {}))


def test_autocast_casts_lora_once_for_all_passes() -> None:
    """In PEFT's own linears, which a callback meets."""
    module: Any = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    model = LocalModel(module, live_shape(module))
    kept = KeptPasses(model)
    kept.begin_step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for inputs, masks in batches("llama"):
            with kept.record_forward(*masks):
                loss = module(**inputs)[0].sum()
            loss.backward()
    with Casts() as casts:
        refit_by_replay(model, draw(model.shape, FEW), kept.passes(), step=7)
    lora = [p for name, p in module.named_parameters() if ".lora_" in name]
    assert [casts.times[id(p)] for p in lora] == [1] * len(lora)


def test_so_it_does_from_embeddings() -> None:
    """A model with images is called with them."""
    model = live("llama")
    expected = live("llama")
    keep = draw(model.shape, FEW)
    embed: Any = model.module.get_submodule("base_model.model.model.embed_tokens")
    of = batches("llama")
    replay(model, keep, [({"inputs_embeds": embed(x["input_ids"])}, masks) for x, masks in of])
    refit_from_ordinary_passes(expected, keep, of)
    assert_same_refit("llama", model, expected, keep)


def test_so_it_does_for_a_second_target_and_an_encoder_alone() -> None:
    model = live("t5")
    expected = live("t5")
    keep = draw(model.shape, FEW)
    (first, masks), (padded, padded_masks) = batches("t5")
    alone = {name: padded[name] for name in ("input_ids", "attention_mask")}

    def calls(encoded: Tensor) -> list[Batch]:
        second: dict[str, Any] = {"encoder_outputs": (encoded,)}
        second |= {"attention_mask": first["attention_mask"]}
        second |= {"decoder_input_ids": first["input_ids"][:, 5:12]}
        return [(first, masks), (second, masks), (alone, padded_masks)]

    with torch.no_grad():
        of = calls(expected.module(**first).encoder_last_hidden_state)
    refit_from_ordinary_passes(expected, keep, of)
    kept = KeptPasses(model)
    kept.begin_step()
    model.module.train()
    with kept.record_forward(*masks):
        output = model.module(**first)
    losses = [output[0].sum()]
    for inputs, of_call in calls(output.encoder_last_hidden_state)[1:]:
        with kept.record_forward(*of_call):
            losses.append(run(model, inputs)[0].sum())
    torch.stack(losses).sum().backward()
    refit_by_replay(model, keep, kept.passes(), step=7)
    assert_same_refit("t5", model, expected, keep)


def test_a_refit_that_fails_names_step_and_linear_and_leaves_the_model_as_it_was() -> None:
    model = live("llama")
    keep = draw(model.shape, FEW)
    model.module.train()
    model.layers[1].eval()
    modes = [part.training for part in model.module.modules()]
    nothing = [(x, (torch.zeros(2, 17, dtype=torch.bool),)) for x, _ in batches("llama")]
    kept = KeptPasses(model)
    kept.begin_step()
    for inputs, masks in nothing:
        with kept.record_forward(*masks):
            loss = model.module(**inputs)[0].sum()
        loss.backward()
    kept.detach()
    with pytest.raises(RunError, match=r"step 7: layer 0 self_attn\.o_proj"):
        refit_by_replay(model, keep, kept.passes(), step=7)
    assert [part.training for part in model.module.modules()] == modes
    for module in model.module.modules():
        assert not module._forward_pre_hooks


def test_an_evaluation_is_not_kept_nor_a_graph() -> None:
    model = live("llama")
    embed: Any = model.module.get_submodule("base_model.model.model.embed_tokens")
    ids = torch.arange(10).view(2, 5)
    embedded = embed(ids).requires_grad_()
    passes = KeptPasses(model)
    passes.begin_step()
    model.module(input_ids=ids)
    with passes.record_forward(None):
        loss = model.module(inputs_embeds=embedded, use_cache=True)[0].sum()
        model.module(input_ids=ids)  # no backward pass follows
    loss.backward()
    model.module(input_ids=ids)
    (kept,) = passes.passes()
    assert torch.equal(kept[0].inputs["inputs_embeds"], embedded)
    for value in kept[0].inputs.values():
        assert isinstance(value, Tensor | bool | int | float | str)  # no cache
        assert not (isinstance(value, Tensor) and value.requires_grad)


def test_no_pass_is_kept_after_the_last_cut(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, kv_heads=4)
    config = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1, cooldown_fraction=0.5)
    run = PlainRun(folder, fresh_lora(open_pretrained(folder).shape), config, steps=6)
    kept: list[int] = []
    for step, batch in enumerate(make_batches(steps=6, samples=6, tokens=8, vocab=97, seed=3), 1):
        run.step(step, batch)
        assert run.pruner.passes is not None
        kept.append(len(run.pruner.passes.passes()))
    assert run.cuts[-1].step == run.plan.last_cut
    assert kept[run.plan.last_cut - 2] > 0
    assert not any(kept[run.plan.last_cut :])
