"""A linear that no recorded pass calls is named before the first update, whoever goes around it."""

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
