"""The method with its model on a virtual card. It finds operations on tensors of two devices, as a GPU would.

tests/streams does so with whole steps and cuts, of which here are those of other criteria and families.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.model.codecs import INT8
from loraprune_ds.model.frozen import Blocks, QuantisedLinear
from loraprune_ds.pruning.replay import refit_by_replay
from tests.oracle.models import make_batches
from tests.streams.virtual_card import CARD, CPU, device_of, is_card, watching
from tests.support.driver import random_lora
from tests.support.families import SIZES, tiny_model
from tests.support.plain_training import Batch, PlainRun

SAMPLES, WINDOW, PADDED = 6, 12, 3  # tokens at the end of every second sample
REFIT: dict[str, Any] = {"compensate": "least_squares"}
RATIO = 0.2  # which experts alone can give


@contextmanager
def on_virtual_card() -> Iterator[None]:
    # a backward pass sees only the second
    with watching(), patch.object(Tensor, "device", property(device_of)):
        yield


def padded_batch() -> tuple[Batch, Tensor]:
    """Returns a batch, and the mask of its real tokens."""
    (batch,) = make_batches(
        steps=1, samples=SAMPLES, tokens=WINDOW, vocab=SIZES["vocab_size"], seed=3
    )
    mask = torch.ones(SAMPLES, WINDOW, dtype=torch.bool)
    mask[::2, -PADDED:] = False
    return (batch[0], batch[1].masked_fill(~mask, -100)), mask


def scored_and_refitted(run: PlainRun, device: torch.device) -> list[Tensor]:
    """Makes one step and prepares a cut. Returns scores and refitted weights."""
    (ids, labels), mask = padded_batch()
    pruner = run.pruner
    with pruner.record_step(1):
        for rows in torch.arange(SAMPLES).split(2):
            with pruner.record_forward(mask[rows]):  # which stays on the host, as a trainer's does
                logits = run.model(input_ids=ids[rows].to(device)).logits[:, :-1].flatten(0, 1)
            wanted = labels[rows][:, 1:].flatten().to(device)
            torch.nn.functional.cross_entropy(
                logits, wanted, ignore_index=-100, reduction="sum"
            ).backward()
        pruner.score(1)
    pruner.note_tokens(int(mask.sum()))
    assert pruner._unchecked is None or pruner._unchecked.check() is None
    scores = pruner.average.on_host()
    assert scores is not None
    keep = pruner._rank(scores, pruner.schedule.last_cut)
    if pruner.passes is not None:
        refit_by_replay(pruner.model, keep, pruner.passes.passes(), 1)
    pruner.average.cut(keep)
    left = [layer[kind] for layer in pruner.average.scores or [] for kind in layer]
    changed = [p for name, p in run.model.named_parameters() if name.endswith("base_layer.weight")]
    return [
        x.detach().cpu().clone()
        for x in (*(layer[kind] for layer in scores for kind in layer), *left, *changed)
    ]


def send_by_nccl(*given: Any) -> Tensor:
    """Stands for a collective of one rank. NCCL takes no tensor of the host."""
    assert is_card(given[-1])
    return given[-1]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"criterion": "lora", **REFIT}),
        ("llama", {"criterion": "fisher", "ranking": "global"}),
        ("llama", {"criterion": "magnitude"}),
        ("llama", {"criterion": "random"}),
        ("phi3", {"criterion": "fisher", **REFIT}),
        ("starcoder2", {"criterion": "lora"}),
        ("qwen3_moe", {"criterion": "fisher"}),
        ("mixtral", {"criterion": "lora"}),
    ],
)
def test_scores_and_refits_stay_on_their_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    tiny_model(family, seed=1).save_pretrained(tmp_path)
    settings |= {"ratio": RATIO, "warmup_fraction": 0.0, "prune_every": 1}
    prune = PruneConfig(protected_first=0, channel_multiple=1, **settings)
    on_host, on_card = (PlainRun(tmp_path, random_lora(tmp_path), prune, 10) for _ in range(2))
    expected = scored_and_refitted(on_host, CPU)
    for name in ("all_reduce", "reduce_to"):
        monkeypatch.setattr(on_card.prunable.comm, name, send_by_nccl)
    with on_virtual_card():
        on_card.model.to(CARD)  # pyright: ignore[reportArgumentType]
        cast(Any, on_card.prunable).device = CARD
        found = scored_and_refitted(on_card, CARD)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_weights_stay_on_their_device(axis: int) -> None:
    form, stock = Blocks(INT8, torch.float32, axis == 1), torch.nn.Linear(96, 70)
    linear = QuantisedLinear(stock, form, form.split(stock.weight.detach()))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    expected, decoded = linear(x), form.decode(linear.weight[5:9], 5, linear.weight_scale, 0)
    with on_virtual_card():
        linear.to(CARD)
        found = (
            linear(x.to(CARD)).cpu(),
            form.decode(linear.weight[5:9], 5, linear.weight_scale, 0).cpu(),
        )
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], decoded)
