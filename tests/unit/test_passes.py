"""The kept inputs of passes: how many stay, what a file holds of them, and how they are dealt out to ranks."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache

from loraprune_ds.pruning.passes import MOST_STEPS, Call, KeptPasses
from loraprune_ds.pruning.step import Pruner
from tests.support.refusals import must_name

IDS = torch.arange(6).view(2, 3)
MASK = torch.tensor([[True, True, False], [True, True, True]])


class Stack(nn.Module):
    """Stands for the module of a list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, *, fails: bool = False, **more: Any) -> tuple[Tensor]:
        if fails:
            raise OutOfMemoryError
        return (self.weight * 2,)


class OutOfMemoryError(Exception):
    pass


def train(stack: nn.Module, *args: Any, **named: Any) -> None:
    stack(*args, **named)[0].backward()


def live(rank: int = 0, world_size: int = 1, stacks: int = 1) -> Any:
    base = nn.ModuleList([Stack() for _ in range(stacks)])
    lists = [SimpleNamespace(path=f"{number}.layers") for number in range(stacks)]
    return SimpleNamespace(
        module=SimpleNamespace(get_base_model=lambda: base),
        shape=SimpleNamespace(family=SimpleNamespace(layer_lists=lists)),
        device=torch.device("cpu"),
        rank=rank,
        world_size=world_size,
        stacks=base,
    )


def through_a_file(kept: KeptPasses, path: Path) -> Any:
    torch.save(kept.to_plain(), path)
    return torch.load(path, weights_only=True)


def test_whatever_a_trainer_passes_comes_back_from_a_file(tmp_path: Path) -> None:
    """Only plain values and tensors, which torch reads without running code."""
    model = live()
    kept = KeptPasses(model)
    kept.begin_step()
    passed: dict[str, Any] = {
        "attention_mask": {"full": MASK, "sliding": None},
        "dtype": torch.bfloat16,
        "is_causal": True,
        "scale": 0.5,
        "name": "sdpa",
        "lengths": [[1, 2], [IDS]],
        "pair": (IDS, 3),
    }
    with kept.record_forward(MASK), torch.autocast("cpu", torch.bfloat16):
        train(model.stacks[0], IDS, cache=DynamicCache(), nothing=None, use_cache=True, **passed)
    kept.end_step(tokens=5, inputs=9)
    other = KeptPasses(live())
    other.restore([lambda: through_a_file(kept, tmp_path / "passes.pt")])
    ((call,),) = (of_pass.values() for of_pass in other.passes())
    expected = {"input_ids": IDS, **passed, "pair": [IDS, 3]}
    # values of tensors, too
    assert {name: str(value) for name, value in call.inputs.items()} == {
        name: str(value) for name, value in expected.items()
    }
    assert call.mask is not None
    assert torch.equal(call.mask, MASK)
    assert (call.autocast, other.tokens) == (torch.bfloat16, 5)


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 4, 3), torch.zeros(2, 1, 4, 3), 0)
    return cache


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        (
            "attention_mask",
            create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, "cpu"),
            "BlockMask",
        ),
        ("past_key_values", filled_cache(), "DynamicCache"),
        ("lengths", {"each": [1, object()]}, "object"),
    ],
)
def test_what_no_refit_can_repeat_is_refused_in_the_forward_pass(
    name: str, value: Any, kind: str
) -> None:
    """Without it the repeated pass would compute something else."""
    model = live()
    kept = KeptPasses(model)
    kept.begin_step()

    def call() -> None:
        with kept.record_forward(None):
            model.stacks[0](IDS, **{name: value})

    must_name(f"{name} {kind} compensate", call)


def test_a_trainer_may_use_its_batch_again(tmp_path: Path) -> None:
    """Its buffer is not in the file either."""
    model = live()
    kept = KeptPasses(model)
    kept.begin_step()
    buffer = torch.ones(100_000, 3, dtype=torch.long)
    masks = torch.ones(100_000, 3, dtype=torch.bool)
    with kept.record_forward(masks[:2]):
        train(model.stacks[0], buffer[:2])
    buffer.zero_()
    masks.zero_()
    (of_pass,) = kept.passes()
    assert of_pass[0].inputs["input_ids"].all()
    assert cast(Tensor, of_pass[0].mask).all()
    through_a_file(kept, tmp_path / "passes.pt")
    assert (tmp_path / "passes.pt").stat().st_size < 10_000


def numbered_passes(world_size: int, count: int) -> list[Any]:
    """Makes what the ranks of a checkpoint have written. Micro-batch m was on rank m mod world_size."""
    files: list[Any] = []
    for rank in range(world_size):
        passes = [
            {0: vars(Call({"input_ids": torch.full((1, 3), number)}, None, None))}
            for number in range(rank, count, world_size)
        ]
        files.append({"tokens": [7, 8], "steps": [passes, passes]})
    return files


def readers(files: list[Any], reads: list[int] | None = None) -> list[Callable[[], Any]]:
    """Makes what reads each file. Notes in `reads` which was read."""

    def read(rank: int) -> Any:
        if reads is not None:
            reads.append(rank)
        return files[rank]

    return [partial(read, rank) for rank in range(len(files))]


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [(1, 2, 3), (2, 3, 4), (3, 2, 3), (3, 2, 8), (2, 2, 4), (3, 1, 3), (1, 3, 1), (5, 3, 7)],
)
def test_all_passes_go_to_other_ranks(before: int, after: int, count: int) -> None:
    """Also if ranks made unequal numbers. A rank without any has one without tokens, to enter each layer."""
    found: list[int] = []
    for rank in range(after):
        kept = KeptPasses(live(rank, after))
        kept.restore(readers(numbered_passes(before, count)))
        assert [step.tokens for step in kept.steps] == [7, 8]
        first, second = ([of_pass[0] for of_pass in step.passes] for step in kept.steps)
        assert str(first) == str(second)
        assert first
        for call in first:
            if call.mask is None:
                found.append(int(call.inputs["input_ids"][0, 0]))
            else:
                assert call.mask.shape == (1, 3)
                assert not call.mask.any()
                assert len(first) == 1
    assert sorted(found) == list(range(count))


@pytest.mark.parametrize(
    ("before", "rank", "after", "count", "files"),
    [
        (4, 2, 4, 12, [2]),
        (4, 1, 2, 12, [1, 3]),
        (2, 3, 4, 6, [1]),
        (2, 2, 3, 4, [0]),
        (5, 1, 3, 5, [1, 4]),
        (1, 2, 3, 1, [0]),  # without tokens
        (3, 0, 1, 3, [0, 1, 2]),
    ],
)
def test_a_rank_reads_each_file_that_it_needs_once_and_no_other(
    before: int, rank: int, after: int, count: int, files: list[int]
) -> None:
    reads: list[int] = []
    kept = KeptPasses(live(rank, after))
    kept.restore(readers(numbered_passes(before, count), reads))
    assert sorted(reads) == files


@pytest.mark.parametrize(
    ("stacks", "tokens", "left"),
    [(1, 15, 3), (1, 40, 1), (1, 41, 1), (1, 39, 2), (2, 15, 6), (1, 1, MOST_STEPS)],
)
def test_only_steps_that_a_refit_needs_stay(stacks: int, tokens: int, left: int) -> None:
    """Ten tokens for each of four inputs, in both stacks."""
    kept = KeptPasses(live(stacks=stacks))
    for _ in range(MOST_STEPS + 4):
        kept.begin_step()
        kept.end_step(tokens, inputs=4)
    assert (len(kept.steps), kept.tokens) == (left, left * tokens)


def test_an_encoder_and_its_decoder_are_one_pass() -> None:
    """Hooks of a foreign trainer record them one after the other."""
    model = live(stacks=2)
    kept = KeptPasses(model)
    kept.begin_step()
    for _ in range(2):
        with kept.record_forward(MASK, MASK):
            train(model.stacks[0], IDS)
        with kept.record_forward(None, None):
            train(model.stacks[1], IDS, encoder_hidden_states=IDS.double())
    assert [list(of_pass) for of_pass in kept.passes()] == [[0, 1], [0, 1]]
    assert kept.passes()[0][1].mask is None
    kept.begin_step()
    with kept.record_forward(None, None):
        must_name("encoder compensate", model.stacks[1], IDS)


def test_a_second_target_repeats_the_encoder_without_its_tokens() -> None:
    model = live(stacks=2)
    kept = KeptPasses(model)
    kept.begin_step()
    with kept.record_forward(MASK, None):
        train(model.stacks[0], IDS)
        for target in (IDS, IDS + 1):
            train(model.stacks[1], target)
    first, second = kept.passes()
    assert torch.equal(first[0].inputs["input_ids"], second[0].inputs["input_ids"])
    assert torch.equal(cast(Tensor, first[0].mask), MASK)
    assert not cast(Tensor, second[0].mask).any()
    for of_pass, target in ((first, IDS), (second, IDS + 1)):
        assert torch.equal(of_pass[1].inputs["input_ids"], target)
        assert of_pass[1].mask is None


def test_a_pass_that_failed_and_was_tried_again_counts_once() -> None:
    """Forward or backward, also in the encoder. Only a backward pass that has ended makes it count."""
    model = live(stacks=2)
    encoder, decoder = model.stacks
    kept = KeptPasses(model)
    kept.begin_step()
    with kept.record_forward(None, None):
        for stack in (encoder, decoder):
            with pytest.raises(OutOfMemoryError):
                stack(IDS, fails=True)
            (failed,) = stack(IDS)
            failing = stack.weight.register_hook(Mock(side_effect=OutOfMemoryError))
            with pytest.raises(OutOfMemoryError):
                failed.backward()
            failing.remove()
            assert len(kept.passes()) == (stack is decoder)
            train(stack, IDS)
    assert [call.mask is None for of_pass in kept.passes() for call in of_pass.values()] == [
        True,  # its decoder's calls failed
        False,
        False,
        True,
    ]


def test_no_pass_is_kept_once_no_cut_is_left() -> None:
    schedule = Mock(is_scored=lambda step: False)
    passes = Mock(steps=["of the last cut"])
    with Pruner.record_step(Mock(schedule=schedule, passes=passes, mask_gradients=None), 9):
        assert passes.steps == []
