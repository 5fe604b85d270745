"""What a trainer's passes count as. A linear that none calls is named before the first update."""

from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import optim
from torch.nn.functional import linear, silu

from loraprune_ds import Pruning
from loraprune_ds.config_types import Criterion
from loraprune_ds.model.classes import decoder_layers
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import PRUNE, STEPS, make_model
from tests.support.ranks import RankPool
from tests.support.refusals import must_name

IDS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=4)


def whole(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Computes LoRA and its linear from their weights alone, as fused kernels do."""
    delta = linear(linear(x, module.lora_A.default.weight), module.lora_B.default.weight)
    return linear(x, module.base_layer.weight) + delta * module.scaling["default"]


def fused(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    return whole(mlp.down_proj, silu(whole(mlp.gate_proj, x)) * whole(mlp.up_proj, x))


def go_around(model: Any) -> Any:
    mlp: Any = decoder_layers(model)[1].mlp
    mlp.forward = MethodType(fused, mlp)
    return mlp


def train_a_step(model: Any, criterion: Criterion = "fisher", before: Any = None) -> optim.AdamW:
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = replace(PRUNE, criterion=criterion, normalize="step")
    pruning = Pruning(model.train(), optimizer, config, STEPS)
    pruning.begin_step()
    if before is not None:
        before()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    pruning.end_step()
    assert pruning.step == 1
    pruning.close()
    return optimizer


@pytest.mark.parametrize("criterion", ["fisher", "lora", "magnitude", "random"])
def test_a_replaced_forward_is_named_with_its_maker(folder: Path, criterion: Criterion) -> None:
    model = make_model(folder)
    before = [p.clone() for p in model.parameters()]
    go_around(model)
    names = "layer 1 mlp.down_proj LlamaMLP forward tests.unit.test_forward_watch"
    must_name(names, train_a_step, model, criterion)
    assert all(map(torch.equal, model.parameters(), before))  # no update


def test_known_kernels_are_named_with_what_turns_them_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for maker, advice in (
        ("axolotl.kernels.lora", "lora_mlp_kernel false"),
        ("unsloth.kernels.fast_lora", "transformers"),
    ):
        model = make_model(folder)
        monkeypatch.setattr(fused, "__module__", maker)
        go_around(model)
        must_name(f"{maker} {advice}", train_a_step, model)


def test_a_pass_without_gradient_does_not_count(folder: Path) -> None:
    """Such as the one of DPO's reference, or a generation."""
    model = make_model(folder)
    mlp = go_around(model)

    def refer() -> None:
        del mlp.forward
        with torch.no_grad():
            model(input_ids=IDS)
        mlp.forward = MethodType(fused, mlp)

    must_name("layer 1 mlp.down_proj", train_a_step, model, before=refer)


def test_nothing_stays_on_a_model_that_calls_all(folder: Path) -> None:
    model = make_model(folder)
    train_a_step(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def one_rank_goes_around(folder: Path) -> int:
    """Trains on DDP. Rank 0 has its own way around a linear, so only rank 1 calls it."""
    model = make_model(folder)
    if torch.distributed.get_rank() == 0:
        go_around(model)
    config = replace(PRUNE, criterion="magnitude")
    model = torch.nn.parallel.DistributedDataParallel(model.train())
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pruning = Pruning(model, optimizer, config, STEPS)
    for _ in range(2):
        pruning.begin_step()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        pruning.end_step()
    return pruning.step


def test_one_rank_that_calls_it_is_enough(ranks: RankPool, folder: Path) -> None:
    assert ranks.run(2, one_rank_goes_around, folder) == [2, 2]


# What counts

PADDED = torch.tensor([[5, 9, 11, 4, 8, 3, 0, 0], [7, 4, 60, 33, 21, 2, 9, 1]])
MASK = torch.arange(8) < torch.tensor([[6], [8]])


def train_by(forward: Any, model: Any) -> list[torch.Tensor]:
    """Trains with two cuts and refits, by passes that `forward` makes. All count once."""
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = replace(PRUNE, criterion="lora", normalize="step", compensate="least_squares")
    pruning = Pruning(model.train(), optimizer, config, STEPS)
    for _ in range(STEPS):
        pruning.begin_step()
        forward(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pruning.end_step()
    assert len(pruning.cuts) == 2
    assert {step.tokens for step in pruning.recorder.history.steps} == {int(MASK.sum())}
    pruning.close()
    return [*model.parameters()]


def named(model: Any) -> torch.Tensor:
    return model.get_base_model().model(input_ids=PADDED, attention_mask=MASK)[0]


def positional(model: Any) -> torch.Tensor:
    return model.get_base_model().model(PADDED, MASK)[0]


def again_after(fail: Any) -> Any:
    """Tries a pass again after its failure, as for want of memory."""

    def forward(model: Any) -> torch.Tensor:
        with pytest.raises(MemoryError):
            fail(model)
        model.zero_grad()
        return named(model)

    return forward


def fail_behind_the_decoder(model: Any) -> None:
    named(model)
    raise MemoryError


def fail_in_a_layer(model: Any) -> None:
    hook = decoder_layers(model)[2].register_forward_pre_hook(raise_error)
    try:
        named(model)
    finally:
        hook.remove()


def fail_in_the_backward_pass(model: Any) -> None:
    mlp: Any = decoder_layers(model)[1].mlp
    weight = mlp.down_proj.lora_B.default.weight
    hook = weight.register_hook(raise_error)
    try:
        named(model).square().mean().backward()
    finally:
        hook.remove()


def raise_error(*_: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    "forward",
    [
        positional,
        again_after(fail_behind_the_decoder),
        again_after(fail_in_a_layer),
        again_after(fail_in_the_backward_pass),
    ],
)
def test_each_token_counts_once(folder: Path, forward: Any) -> None:
    """In the records and in refits, which find the same weights."""
    expected = train_by(named, make_model(folder))
    found = train_by(forward, make_model(folder))
    assert all(map(torch.equal, found, expected))
