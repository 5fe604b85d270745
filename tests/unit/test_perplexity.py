"""Perplexity equals a computation token by token, for any batch size and number of ranks."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.perplexity import Perplexity, measure_perplexity
from loraprune_ds.pretrained.tokenizer import Starts, text_starts
from loraprune_ds.pretrained.windows import split_batches, split_windows, tokenize
from tests.oracle.models import make_tiny_llama, make_tokenizer
from tests.support.one_rank import rank_of
from tests.support.refusals import must_name

VOCAB = 97
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 20


@pytest.fixture(scope="module")
def forward(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = make_tiny_llama(tmp_path_factory.mktemp("model"), vocab=VOCAB)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return lambda input_ids: model(input_ids=input_ids, use_cache=False).logits


def losses_of(forward: Any) -> Any:
    """Makes the function that `measure_perplexity` calls from one that returns logits."""

    def losses(input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = forward(input_ids)[:, :-1].float()
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], reduction="none"
        )

    return losses


def twice(batches: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns ids and labels, which are the same in a text."""
    return [(ids, ids) for ids in batches]


def measure(forward: Any, batches: Sequence[Tensor]) -> Perplexity:
    return measure_perplexity(losses_of(forward), twice(batches), rank_of(1, 0))


def token_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))


def slow_perplexity(forward: Any, windows: Iterable[Tensor]) -> float:
    """Computes one token at a time."""
    losses = []
    for window in windows:
        with torch.no_grad():
            logits = forward(window[None])[0].double()
        for t in range(1, len(window)):
            losses.append(float(torch.logsumexp(logits[t - 1], 0) - logits[t - 1, window[t]]))
    return math.exp(math.fsum(losses) / len(losses))


def over_ranks(forward: Any, batches: Sequence[Tensor], world_size: int) -> list[Perplexity]:
    """Returns the result of each simulated rank. All must run the model equally often."""
    parts: list[Tensor] = []
    calls = [0] * world_size

    def be_rank(rank: int, all_reduce: Any) -> Perplexity:
        def counted(input_ids: Tensor) -> Tensor:
            calls[rank] += 1
            return forward(input_ids)

        comm = rank_of(world_size, rank, all_reduce=all_reduce)
        return measure_perplexity(losses_of(counted), twice(batches), comm)

    for rank in range(world_size):
        be_rank(rank, lambda values: parts.append(values.clone()) or values)
    total = torch.stack(parts).sum(0)
    found = [be_rank(rank, lambda values: total) for rank in range(world_size)]
    assert len(set(calls)) == 1
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_it_is_the_mean_of_all_tokens_for_any_batches_and_ranks(
    forward: Any, batch_size: int, world_size: int
) -> None:
    """With 7 windows most batch sizes leave a smaller last batch, and most ranks an unequal share."""
    windows = token_ids(7 * 16).view(7, 16)
    expected = slow_perplexity(forward, windows)
    assert expected > 5  # not every model gives this number
    for found in over_ranks(forward, windows.split(batch_size), world_size):
        assert found == Perplexity(pytest.approx(expected, rel=1e-6), 7 * 15, 7)  # type: ignore[arg-type]


# From text to windows


def test_windows_are_the_text_tokenised_once_with_the_tail_dropped() -> None:
    tokenizer = make_tokenizer(VOCAB + 200)
    ids = tokenizer(TEXT)["input_ids"]
    windows = split_windows(TEXT, tokenizer, 32, None)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == ids[: len(ids) // 32 * 32]
    assert split_windows(TEXT, tokenizer, 32, 3).tolist() == windows[:3].tolist()
    assert split_windows(TEXT, tokenizer, 32, 10_000).tolist() == windows.tolist()


def test_every_window_can_begin_with_bos() -> None:
    """BOS replaces a token that is not predicted, so the predictions are the same."""
    tokenizer, bos = make_tokenizer(VOCAB + 200), 1
    before, after = (split_windows(TEXT, tokenizer, 16, 9, start) for start in (None, bos))
    assert len(before) == 9
    assert (after[:, 0] == bos).all()
    assert (before[:, 0] != bos).all()
    assert torch.equal(after[:, 1:], before[:, 1:])


def test_only_gemmas_windows_begin_with_bos() -> None:
    tokenizer = make_tokenizer(VOCAB)
    windows = {name: text_starts(tokenizer, family, {}).window for name, family in FAMILIES.items()}
    assert [name for name in windows if windows[name] == tokenizer.bos_token_id] == [
        x for x in windows if "gemma" in x
    ]


def test_only_the_beginning_of_a_long_text_is_tokenised_if_it_has_enough_tokens() -> None:
    """A token of the second tokenizer has 40 characters, as in long runs of spaces."""
    tokenizer, lengths = make_tokenizer(VOCAB + 200), []
    text = TEXT * 50

    def counting(given: str, **settings: Any) -> Any:
        lengths.append(len(given))
        return tokenizer(given, **settings)

    def coarse(text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(text[i]) for i in range(0, len(text), 40)]}

    assert tokenize(text, counting, 20)[:20].tolist() == tokenizer(text)["input_ids"][:20]  # type: ignore[arg-type]
    assert lengths == [20 * 32]
    text = "".join(chr(65 + i % 50) * 40 for i in range(200))
    windows = split_windows(text, coarse, 10, 4)  # type: ignore[arg-type]
    assert windows.flatten().tolist() == [65 + i % 50 for i in range(40)]


def test_a_text_shorter_than_a_window_or_with_ids_that_the_embedding_lacks_is_refused() -> None:
    """A tokenizer may have more ids than the text."""
    tokenizer, text = make_tokenizer(VOCAB + 200), "hello, é"
    must_name("text 5 6", split_windows, "hello", tokenizer, 6, None)
    assert split_windows("hello", tokenizer, 5, None).shape == (1, 5)
    largest = max(tokenizer(text)["input_ids"])
    split_batches(text, tokenizer, 2, 3, Starts(), 2, VOCAB)
    given = text, tokenizer, 3, None, Starts(), 2
    split_batches(*given, largest + 1)
    must_name(f"text {largest} vocab_size", split_batches, *given, largest)


# Extreme logits


@pytest.mark.parametrize(
    ("value", "expected"), [(1e2, math.exp(100)), (1e4, math.inf), (math.nan, math.nan)]
)
def test_a_hopeless_model_has_an_infinite_perplexity_and_a_broken_one_none(
    value: float, expected: float
) -> None:
    def forward(input_ids: Tensor) -> Tensor:
        logits = torch.zeros(*input_ids.shape, VOCAB)
        logits[..., 0] = value  # token 0 is never in the text
        return logits

    found = measure(forward, token_ids(2 * 8).view(2, 8).split(1)).perplexity
    assert found == pytest.approx(expected, nan_ok=True)


def test_losses_are_summed_in_fp64() -> None:
    losses = 600 + torch.rand(8, 31, generator=torch.Generator().manual_seed(1))
    batches = [token_ids(8 * 32).view(8, 32)]
    found = measure_perplexity(
        lambda input_ids, labels: losses, twice(batches), rank_of(1, 0)
    ).perplexity
    assert found == pytest.approx(
        math.exp(math.fsum(losses.flatten().tolist()) / losses.numel()), rel=1e-9
    )


def test_low_precision_logits_are_enough_and_have_no_graph() -> None:
    windows = token_ids(64 * 32).view(64, 32)
    logits = (
        torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1))
        .bfloat16()
        .requires_grad_()
    )

    def forward(ids: Tensor) -> Tensor:
        assert not logits[ids].requires_grad
        return logits[ids]

    found = measure(forward, windows.split(8)).perplexity
    assert found == pytest.approx(slow_perplexity(forward, windows), rel=1e-6)
