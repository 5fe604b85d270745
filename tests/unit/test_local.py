"""Pruning in a plain loop without DeepSpeed: what a trainer does to gradients after a backward changes no score."""

import io
import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from torch import nn, optim

from loraprune_ds import Pruning, linear_names
from loraprune_ds.model.shape import LinearId
from loraprune_ds.pruning.prunable_model import OwnedShard
from tests.oracle.models import make_tiny_llama
from tests.support.local_training import PRUNE, STEPS, Make, Rows, make_model, train
from tests.support.refusals import must_name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Rows:
    return train(make_model(folder))[0]


def same(rows: Rows, others: Rows, **close: Any) -> None:
    for (scores, kept), (other_scores, other_kept) in zip(rows, others, strict=True):
        assert kept == other_kept
        torch.testing.assert_close(scores, other_scores, **close)


BITWISE: dict[str, Any] = {"rtol": 0.0, "atol": 0.0}


def test_neither_clipping_nor_a_loss_scaler_changes_a_bit_of_a_score(
    folder: Path, plain: Rows
) -> None:
    assert plain[0][1] != plain[-1][1]
    cases: tuple[dict[str, Any], ...] = (
        {"clip": True},
        {"scale": 4096.0},
        {"scale": 4096.0, "clip": True, "of_accelerate": True},
    )
    for settings in cases:
        same(train(make_model(folder), **settings)[0], plain, **BITWISE)


@pytest.mark.parametrize("criterion", ["lora", "fisher"])
def test_clipping_hides_neither_the_norm_nor_the_layer_of_a_nan(
    folder: Path, criterion: str
) -> None:
    clipped, not_clipped = (
        train(make_model(folder), criterion=criterion, clip=clip)[2] for clip in (True, False)
    )
    assert [step.grad_norm for step in clipped] == [step.grad_norm for step in not_clipped]
    model = make_model(folder)
    layer = model.get_base_model().model.layers[2]
    layer.mlp.up_proj.lora_A.default.weight.register_hook(lambda gradient: gradient * math.nan)
    must_name("layer 2", train, model, criterion=criterion, clip=True)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_micro_batches_and_checkpointing_add_up(
    folder: Path, plain: Rows, reentrant: bool | None
) -> None:
    model = make_model(folder)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    same(train(model, parts=2, clip=True)[0], plain, rtol=1e-4, atol=0.0)


# a scaler calls fused ones anyway
@pytest.mark.parametrize("make", [optim.SGD, partial(optim.AdamW, fused=True)])
def test_a_step_that_the_scaler_skips_is_not_scored(folder: Path, make: Make) -> None:
    rows, _, steps = train(make_model(folder), make, scale=4096.0, overflow=3)
    assert [(step.skipped, step.grad_norm is None) for step in steps] == [
        (i == 3, i == 3) for i in range(1, 6)
    ]
    torch.testing.assert_close(rows[2][0], rows[1][0], **BITWISE)


@pytest.mark.parametrize(("bad", "reader"), [(1, "update"), (2, "cut"), (1, "save"), (1, "close")])
def test_nothing_follows_from_a_score_that_is_not_finite(
    folder: Path, tmp_path: Path, bad: int, reader: str
) -> None:
    """Its check needs no wait of its own: the next step's exchange has it, unless something needs it before."""
    model = make_model(folder).train()
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    pruning = Pruning(model, optimizer, PRUNE, STEPS)
    owned_weight, counts = pruning.model.owned_weight, pruning.model.shape.counts

    def poisoned(linear_id: LinearId) -> OwnedShard:
        shard = owned_weight(linear_id)
        if pruning.step + 1 == bad and linear_id == LinearId(1, "self_attn.q_proj"):
            shard = replace(shard, flat=torch.full_like(shard.flat, math.inf))
        return shard

    pruning.model.owned_weight = poisoned  # type: ignore[method-assign]

    def step() -> None:
        pruning.begin_step()
        ids = torch.arange(8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        pruning.end_step()

    for _ in range(1, bad):
        step()
    if reader != "cut":
        step()
    readers = {"save": lambda: pruning.save(tmp_path / "checkpoint"), "close": pruning.close}
    must_name(f"step {bad} layer 1 self_attn.q_proj finite", readers.get(reader, step))
    assert pruning.model.shape.counts == counts
    assert not list(tmp_path.iterdir())


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("base", "autocast", "needs_scaler"),
    [
        (torch.float32, torch.float16, True),
        (torch.float16, None, True),
        (torch.float16, torch.bfloat16, False),
        (torch.float32, None, False),
    ],
)
def test_gradients_in_fp16_need_a_known_scaler(
    folder: Path, base: torch.dtype, autocast: torch.dtype | None, needs_scaler: bool
) -> None:
    def begin(**known: Any) -> None:
        model = make_model(folder).train()
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                parameter.data = parameter.data.to(base)
        optimizer = optim.SGD(model.parameters(), lr=0.0)
        Pruning(model, optimizer, PRUNE, STEPS, **known).begin_step()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            model(input_ids=IDS)

    begin(scaler=torch.amp.GradScaler("cpu"))
    if needs_scaler:
        must_name("float16 bfloat16 scaler=", begin)
        must_name("scaler=", begin, scaler=torch.amp.GradScaler("cpu", enabled=False))
    else:
        begin()


def test_an_overflow_ends_a_training_whose_update_nothing_skips(folder: Path) -> None:
    """A base in fp16 overflows, too, where gradients are bf16, and Adam would write NaN into LoRA."""
    model = make_model(folder).train()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.half()
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    Pruning(model, optimizer, PRUNE, STEPS).begin_step()
    with torch.autocast("cpu", torch.bfloat16):
        (model(input_ids=IDS, labels=IDS).loss * math.inf).backward()
    must_name("step 1 layer 0", optimizer.step)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_scaler_skips_no_step_whose_gradients_are_finite(folder: Path) -> None:
    model, scaler = make_model(folder).train(), torch.amp.GradScaler("cpu")
    pruning = Pruning(model, optim.SGD(model.parameters()), PRUNE, STEPS, scaler=scaler)
    pruning.begin_step()
    scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
    must_name("end_step step 1", pruning.end_step)


def test_calls_out_of_order_are_refused_until_pruning_has_ended(folder: Path) -> None:
    model = make_model(folder)
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    pruning = Pruning(model, optimizer, PRUNE, STEPS)
    must_name("begin_step", optimizer.step)
    pruning.begin_step()
    must_name("begin_step step 1", pruning.begin_step)
    must_name("end_step step 1", pruning.end_step)
    must_name("step 1 model.train()", optimizer.step)
    must_name("begin_step end_step", optimizer.step)
    pruning.close()
    optimizer.step()


def hooks(model: nn.Module) -> list[Any]:
    """Returns every dictionary of hooks on a model."""
    found = ((name, vars(module)) for name, module in model.named_modules())
    return [
        (name, key, copy(value))
        for name, state in found
        for key, value in state.items()
        if "hooks" in key
    ]


@pytest.mark.parametrize(
    "more", [{}, {"criterion": "fisher", "compensate": "least_squares"}], ids=["lora", "fisher"]
)
def test_nothing_of_pruning_stays_on_a_model_so_it_can_be_saved_and_pruned_again(
    folder: Path, more: dict[str, Any]
) -> None:
    model = make_model(folder)
    before = hooks(model)
    first, optimizer, steps = train(model, **more)
    assert hooks(model) == before
    # the memory of somebody else's process says nothing
    assert not any(step.peak_bytes or step.reserved_bytes for step in steps)
    assert not cast(Any, optimizer)._optimizer_step_pre_hooks
    torch.save(model, io.BytesIO())
    sizes = [len(groups) for groups in first[-1][1]]
    second, *_ = train(model, ratio=0.05, **more)
    assert [len(scores) for scores in second[0][0]] == sizes
    assert sum(map(len, second[-1][1])) < sum(sizes)


@pytest.mark.parametrize(
    "make", [optim.AdamW, optim.Adagrad, optim.NAdam, lambda p, lr: optim.SGD(p, lr, 0.9)]
)
def test_the_state_of_torch_s_optimizers_is_cut(folder: Path, make: Make) -> None:
    _, optimizer, _ = train(make_model(folder), make, lr=1e-3)
    shapes = {
        p: {x.shape for x in state.values() if getattr(x, "ndim", 0)}
        for p, state in optimizer.state.items()
    }
    assert shapes == {p: {p.shape} for p in shapes}
    assert shapes


def test_a_second_adapter_is_cut_too(folder: Path) -> None:
    """DPO's reference may be one."""
    model = make_model(folder)
    lora = LoraConfig(
        r=2, target_modules=linear_names(model.get_base_model()), init_lora_weights=False
    )
    model.add_adapter("ref", lora)
    dense = layer(model).mlp.up_proj.lora_B.ref.weight.clone()
    rows, *_ = train(model)
    channels = rows[-1][1][3]
    assert 1 < len(channels) < len(dense)
    assert torch.equal(layer(model).mlp.up_proj.lora_B.ref.weight, dense[channels])
    model.set_adapter("ref")
    model(input_ids=IDS)


def test_an_update_ends_the_copies_of_its_gradients(folder: Path) -> None:
    """They would be next to a cut, as large as LoRA."""
    model = make_model(folder).train()
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    pruning = Pruning(model, optimizer, PRUNE, STEPS)
    pruning.begin_step()
    model(input_ids=IDS, labels=IDS).loss.backward()
    parameters = [p for lora in pruning.model.lora_parameters() for p in lora.values()]
    assert all(pruning.model.gradient(p).any() for p in parameters)
    optimizer.step()
    optimizer.zero_grad()
    assert not any(pruning.model.gradient(p).any() for p in parameters)


def layer(model: Any) -> Any:
    return model.get_base_model().model.layers[1]


def spread(model: Any) -> Any:
    layer(model).input_layernorm.to("meta")
    return model


compiled: Callable[[Any], Any] = partial(torch.compile, backend="eager")


@pytest.mark.parametrize(
    ("wrap", "make", "names"),
    [
        (nn.DataParallel, optim.SGD, "DataParallel"),
        (spread, optim.SGD, "spread cpu meta"),
        (lambda model: model, optim.Adafactor, "Adafactor"),
        (lambda model: model.bfloat16(), optim.SGD, "bfloat16 autocast_adapter_dtype"),
        (lambda model: model, lambda p, lr: SimpleNamespace(), "SimpleNamespace"),
        (compiled, optim.SGD, "OptimizedModule torch.compile"),
        (
            lambda model: compiled(nn.DataParallel(model)),
            optim.SGD,
            "OptimizedModule torch.compile",
        ),
        (lambda model: nn.DataParallel(compiled(model)), optim.SGD, "module torch.compile"),
        (
            lambda model: layer(model).compile(backend="eager") or model,
            optim.SGD,
            "layers.1 torch.compile",
        ),
    ],
)
def test_a_training_that_cannot_be_cut_is_named(
    folder: Path, wrap: Callable[[Any], Any], make: Callable[..., Any], names: str
) -> None:
    model = make_model(folder)
    must_name(names, Pruning, wrap(model), make(list(model.parameters()), lr=0.1), PRUNE, STEPS)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda model: model.compile(backend="eager") or model, "PeftModel"),
        (lambda model: layer(model).compile(backend="eager") or model, "layers.1"),
        (compiled, "forward pass"),
        (lambda model: compiled(lambda **batch: model(**batch)), "forward pass"),
    ],
    ids=["the model in place", "a layer", "the model", "a function around it"],
)
def test_what_is_compiled_later_is_refused_in_the_first_step(
    folder: Path, wrap: Callable[[Any], Any], name: str
) -> None:
    model = make_model(folder).train()
    pruning = Pruning(model, optim.SGD(model.parameters(), lr=0.1), PRUNE, STEPS)
    model = wrap(model)

    def begin() -> None:
        pruning.begin_step()
        model(input_ids=torch.tensor([[5, 6, 7]]))

    must_name(f"{name} torch.compile", begin)
