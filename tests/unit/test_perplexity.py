"""Perplexity equals a computation token by token, for any batch size and number of ranks."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.errors import UserError
from loraprune_ds.evaluate.perplexity import (
    Batch,
    Perplexity,
    PerplexityProtocol,
    fixed_batches,
    make_batches,
    measure_perplexity,
    sliding_batches,
    split_windows,
    tokenize,
)
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.tokenizer import window_start
from tests.oracle.models import make_tiny_llama, make_tokenizer

VOCAB = 97
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_tiny_llama(
        tmp_path_factory.mktemp("model"),
        heads=4,
        kv_heads=2,
        head_dim=8,
        hidden=32,
        ffn=48,
        layers=2,
        vocab=VOCAB,
        seed=1,
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def forward(model: Any) -> Any:
    return lambda input_ids: model(input_ids=input_ids, use_cache=False).logits


def rank_of(world_size: int, rank: int, all_reduce: Callable[[Tensor], Tensor] = lambda values: values) -> Any:
    """Stands for a Communicator."""
    return SimpleNamespace(device=torch.device("cpu"), rank=rank, world_size=world_size, all_reduce=all_reduce)


def measure(losses: Any, batches: list[Batch]) -> Perplexity:
    return measure_perplexity(losses, batches, rank_of(1, 0))


def losses_of(forward: Any) -> Any:
    """Makes what `measure_perplexity` asks of a model from one that gives logits."""

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = forward(input_ids)[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")

    return losses


def token_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def slow_perplexity(forward: Any, windows: list[Tensor], first: list[int]) -> float:
    """Computes one token at a time. `first`: the first token of each window that counts."""
    losses = []
    for window, start in zip(windows, first, strict=True):
        with torch.no_grad():
            logits = forward(window[None])[0].double()
        for t in range(start, len(window)):
            losses.append(float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, window[t]]))
    return math.exp(math.fsum(losses) / len(losses))


def over_ranks(forward: Any, batches: list[Batch], world_size: int) -> list[Perplexity]:
    """Returns what each of the simulated ranks measures. All must run the model equally often."""
    parts: list[Tensor] = []
    calls = [0] * world_size

    def be_rank(rank: int, all_reduce: Any) -> Perplexity:
        def counted(input_ids: Tensor) -> Tensor:
            calls[rank] += 1
            return forward(input_ids)

        return measure_perplexity(losses_of(counted), batches, rank_of(world_size, rank, all_reduce))

    for rank in range(world_size):
        be_rank(rank, lambda values: parts.append(values.clone()) or values)
    total = torch.stack(parts).sum(0)
    found = [be_rank(rank, lambda values: total) for rank in range(world_size)]
    assert len(set(calls)) == 1
    return found


def test_it_is_the_straightforward_mean(forward: Any) -> None:
    windows = token_ids(7 * 24).view(7, 24)
    expected = slow_perplexity(forward, list(windows), [1] * 7)
    assert expected > 5  # a number that not every model gives
    found = measure(losses_of(forward), fixed_batches(windows, 3))
    assert found.perplexity == pytest.approx(expected, rel=1e-6)
    assert (found.tokens, found.windows) == (7 * 23, 7)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_neither_batch_size_nor_ranks_matter(forward: Any, batch_size: int, world_size: int) -> None:
    windows = token_ids(7 * 16).view(7, 16)
    one = measure(losses_of(forward), fixed_batches(windows, 7))
    for found in over_ranks(forward, fixed_batches(windows, batch_size), world_size):
        assert found.perplexity == pytest.approx(one.perplexity, rel=1e-6)
        assert (found.tokens, found.windows) == (one.tokens, one.windows)


def test_a_mean_of_the_batches_means_is_another_number(forward: Any) -> None:
    """The last batch is smaller and must weigh less."""
    windows = token_ids(5 * 16).view(5, 16)
    means = [math.log(measure(losses_of(forward), fixed_batches(part, 4)).perplexity) for part in windows.split(4)]
    expected = measure(losses_of(forward), fixed_batches(windows, 4)).perplexity
    assert abs(math.exp(sum(means) / 2) / expected - 1) > 1e-3


def test_a_repeated_batch_is_not_counted(forward: Any) -> None:
    windows = token_ids(2 * 16).view(2, 16)
    found = over_ranks(forward, fixed_batches(windows, 1), 5)  # three ranks have nothing of their own
    expected = slow_perplexity(forward, list(windows), [1, 1])
    assert [f.perplexity for f in found] == pytest.approx([expected] * 5, rel=1e-6)


# Sliding windows


@pytest.mark.parametrize("tokens", [16, 17, 20, 21, 40, 43])
@pytest.mark.parametrize("stride", [1, 4, 15])
def test_sliding_predicts_every_token_once_with_the_longest_context(forward: Any, tokens: int, stride: int) -> None:
    ids = token_ids(tokens, seed=tokens)
    windows, first = [ids[:16]], [1]
    counted = 16
    while counted < tokens:
        start = len(windows) * stride
        windows.append(ids[start : start + 16])
        first.append(counted - start)
        counted = min(start + 16, tokens)
    found = measure(losses_of(forward), sliding_batches(ids, 16, stride, None, 3))
    assert found.perplexity == pytest.approx(slow_perplexity(forward, windows, first), rel=1e-6)
    assert (found.tokens, found.windows) == (tokens - 1, len(windows))


def test_sliding_windows_can_be_limited_and_spread_over_ranks(forward: Any) -> None:
    ids = token_ids(60)
    limited = sliding_batches(ids, 16, 8, 3, 2)
    assert sum(len(batch.input_ids) for batch in limited) == 3
    expected = measure(losses_of(forward), sliding_batches(ids[:32], 16, 8, None, 2))
    for found in over_ranks(forward, limited, 3):
        assert found == Perplexity(pytest.approx(expected.perplexity, rel=1e-6), 31, 3)  # type: ignore[arg-type]


# From text to windows


def test_windows_are_the_text_tokenised_once_with_the_tail_dropped() -> None:
    tokenizer = make_tokenizer(VOCAB + 200)
    ids = tokenizer(TEXT)["input_ids"]
    windows = split_windows(TEXT, tokenizer, 32, None)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert split_windows(TEXT, tokenizer, 32, 3).tolist() == windows[:3].tolist()
    assert split_windows(TEXT, tokenizer, 32, 10_000).tolist() == windows.tolist()


@pytest.mark.parametrize("stride", [None, 1, 12])
def test_every_window_can_begin_with_bos(forward: Any, stride: int | None) -> None:
    """It takes the place of a token that is not predicted. So as many are predicted as without it, and the same."""
    tokenizer, bos = make_tokenizer(VOCAB + 200), 1
    protocol = PerplexityProtocol(window=16, stride=stride, max_windows=9)
    plain = make_batches(TEXT, tokenizer, protocol, 4)
    batches = make_batches(TEXT, tokenizer, protocol, 4, bos)
    for before, after in zip(plain, batches, strict=True):
        assert after.predicted == before.predicted < after.input_ids.shape[1]
        assert (after.input_ids[:, 0] == bos).all()
        assert (before.input_ids[:, 0] != bos).all()
        assert torch.equal(after.input_ids[:, 1:], before.input_ids[:, 1:])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_only_gemmas_windows_begin_with_bos(family: str) -> None:
    tokenizer = make_tokenizer(VOCAB)
    assert window_start(tokenizer, FAMILIES[family]) == (tokenizer.bos_token_id if "gemma" in family else None)


def test_only_the_beginning_of_a_long_text_is_tokenised() -> None:
    tokenizer = make_tokenizer(VOCAB + 200)
    text, lengths = TEXT * 50, []
    expected = tokenizer(text)["input_ids"][:20]

    def counting(given: str, **settings: Any) -> Any:
        lengths.append(len(given))
        return tokenizer(given, **settings)

    assert tokenize(text, counting, 20)[:20].tolist() == expected  # type: ignore[arg-type]
    assert lengths == [20 * 32]


def test_a_tokenizer_that_needs_much_more_text_gets_all_of_it() -> None:
    """A token has 40 characters, as in long runs of spaces. So the beginning does not hold enough tokens."""

    def coarse(text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(text[i]) for i in range(0, len(text), 40)]}

    text = "".join(chr(65 + i % 50) * 40 for i in range(200))
    windows = split_windows(text, coarse, 10, 4)  # type: ignore[arg-type]
    assert windows.flatten().tolist() == [65 + i % 50 for i in range(40)]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    tokenizer = make_tokenizer(VOCAB + 200)
    message = r"^the evaluation text has 5 tokens, less than one window of 6$"
    with pytest.raises(UserError, match=message):
        split_windows("hello", tokenizer, 6, None)
    with pytest.raises(UserError, match=message):
        sliding_batches(torch.arange(5), 6, 2, None, 1)
    assert split_windows("hello", tokenizer, 5, None).shape == (1, 5)


# Extreme logits


def test_a_hopeless_model_has_an_infinite_perplexity_and_a_broken_one_none() -> None:
    windows = token_ids(2 * 8).view(2, 8)

    def certain(value: float) -> Any:
        def forward(input_ids: Tensor) -> Tensor:
            logits = torch.zeros(*input_ids.shape, VOCAB)
            logits[..., 0] = value  # token 0 is never in the text
            return logits

        return forward

    hopeless = measure(losses_of(certain(1e2)), fixed_batches(windows, 1)).perplexity
    assert hopeless == pytest.approx(math.exp(100))
    assert measure(losses_of(certain(1e4)), fixed_batches(windows, 1)).perplexity == math.inf
    assert math.isnan(measure(losses_of(certain(math.nan)), fixed_batches(windows, 1)).perplexity)


def test_low_precision_logits_are_summed_in_fp64() -> None:
    windows = token_ids(64 * 32).view(64, 32)
    logits = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = measure(losses_of(lambda ids: logits[ids]), fixed_batches(windows, 8)).perplexity
    assert found == pytest.approx(slow_perplexity(lambda ids: logits[ids], list(windows), [1] * 64), rel=1e-6)


def test_measuring_builds_no_graph(model: Any) -> None:
    seen = []

    def forward(input_ids: Tensor) -> Tensor:
        seen.append(model(input_ids=input_ids).logits.requires_grad)
        return torch.zeros(*input_ids.shape, VOCAB)

    found = measure(losses_of(forward), fixed_batches(token_ids(32).view(2, 16), 1))
    assert seen == [False, False]
    assert found.perplexity == pytest.approx(VOCAB)
