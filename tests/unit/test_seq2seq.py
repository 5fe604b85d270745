"""Encoder-decoders: losses against the stock class, rows of sources with targets, and their evaluation."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loraprune_ds.model.token_loss import IGNORE_INDEX, split_rows, with_token_losses
from tests.families import tiny_model

START = 0
SIZES = ((7, 4), (3, 9), (11, 2))  # of source and target


def pairs() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(3, 97, (n,), generator=generator), torch.randint(3, 97, (m,), generator=generator))
        for n, m in SIZES
    ]


def rows_of(pairs: list[tuple[Tensor, Tensor]], width: int) -> tuple[Tensor, Tensor]:
    """Returns ids and labels of source, start and target, padded on the right."""
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, wanted, (source, target) in zip(ids, labels, pairs, strict=True):
        text = torch.cat([source, torch.tensor([START]), target])
        row[: len(text)], wanted[len(source) + 1 : len(text)] = text, target
    return ids, labels


def test_rows_split_into_what_the_stock_class_reads() -> None:
    source, source_mask, target, target_mask, _ = split_rows(*rows_of(pairs(), 16))
    for i, (own_source, own_target) in enumerate(pairs()):
        assert source[i][source_mask[i]].tolist() == own_source.tolist()
        assert target[i][target_mask[i]].tolist() == [START, *own_target[:-1].tolist()]
    assert (source.shape, target.shape) == ((3, 11), (3, 9))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_losses_are_the_stock_class_s_forward_and_gradient(family: str, attention: str) -> None:
    """t5 scales its hidden states and mt5 does not. Rows of other lengths must not be seen."""
    stock, model = (tiny_model(family, attn_implementation=attention) for _ in range(2))
    model = with_token_losses(model, 5)
    model.lm_head.weight = nn.Parameter(stock.lm_head.weight.detach().clone(), requires_grad=False)
    stock.lm_head.weight = model.lm_head.weight
    expected = [stock(input_ids=x[None], labels=y[None]).loss * len(y) for x, y in pairs()]
    losses = model(**dict(zip(("input_ids", "labels"), rows_of(pairs(), 16), strict=True)))
    torch.testing.assert_close(losses.sum(1), torch.stack(expected), rtol=1e-5, atol=1e-5)
    sum(expected).backward()
    losses.sum().backward()
    found: Any = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        if name != "lm_head.weight":
            scale = parameter.grad.abs().max()  # type: ignore[union-attr]
            torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * float(scale))
