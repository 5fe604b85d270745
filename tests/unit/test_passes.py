"""What is kept of the forward passes for a refit: the last steps that are enough, and on all ranks the same passes."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.local.model import LocalModel
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.passes import Call, KeptPasses
from loraprune_ds.train.data.samples import rank_micro_batches
from tests.oracle.models import make_batches, make_tiny_llama
from tests.support.families import is_seq2seq
from tests.support.family_cuts import dense
from tests.support.plain_training import PlainRun, fresh_lora

STEPS = 2
MICRO_BATCHES = 12
SIZE = 2  # samples of a micro-batch
WINDOW = 5


def live(family: str) -> LocalModel:
    network = dense(family)
    return LocalModel(network.model, network.shape)


@pytest.mark.parametrize(
    ("family", "tokens", "kept"),
    [
        ("llama", [100] * 3, [100]),
        ("llama", [60] * 5, [60] * 2),
        ("llama", [200, 10, 10], [200, 10, 10]),
        ("llama", [200, 10, 10, 95], [10, 95]),
        ("llama", [1] * 40, [1] * 16),
        ("t5", [60] * 5, [60] * 4),  # half of the tokens are its encoder's
    ],
)
def test_the_last_steps_with_ten_tokens_for_each_input_are_kept(
    family: str, tokens: list[int], kept: list[int]
) -> None:
    passes = KeptPasses(live(family))
    for of_step in tokens:
        passes.begin_step()
        passes.end_step(of_step, inputs=10)
    assert [step.tokens for step in passes.steps] == kept


def test_an_evaluation_is_not_kept_nor_a_graph() -> None:
    model = live("llama")
    embed: Any = model.module.get_submodule("base_model.model.model.embed_tokens")
    ids = torch.arange(10).view(2, 5)
    embedded = embed(ids).requires_grad_()
    passes = KeptPasses(model)
    passes.begin_step()
    model.module(input_ids=ids)
    with passes.record_forward(None):
        model.module(inputs_embeds=embedded, use_cache=True)
    model.module(input_ids=ids)
    (kept,) = passes.passes()
    assert torch.equal(kept[0].inputs["inputs_embeds"], embedded)
    for value in kept[0].inputs.values():
        assert isinstance(value, Tensor | bool | int | float | str)  # no cache
        assert not (isinstance(value, Tensor) and value.requires_grad)


def make_passes(model: LocalModel, rank: int, world_size: int) -> KeptPasses:
    """Keeps the passes of a rank. A micro-batch repeats an id of its own, and its last token is padding."""
    model.rank = rank
    model.world_size = world_size
    passes = KeptPasses(model)
    samples = torch.arange(SIZE * MICRO_BATCHES)
    mask = torch.arange(WINDOW).expand(SIZE, -1) < WINDOW - 1
    masks = [mask] * len(model.shape.family.layer_lists)
    for step in range(STEPS):
        passes.begin_step()
        for number, _ in rank_micro_batches(samples, SIZE, rank, world_size):
            ids = torch.full((SIZE, WINDOW), 3 + step * MICRO_BATCHES + number)
            inputs = {"input_ids": ids}
            if is_seq2seq(model.shape.model_type):
                inputs["decoder_input_ids"] = ids
            with passes.record_forward(*masks), torch.no_grad():
                model.module(**inputs)
        passes.end_step(7 + step, inputs=1000)
    passes.detach()
    return passes


def tokens_of(call: Call) -> list[int]:
    """Lists the ids without padding."""
    assert call.mask is not None
    return call.inputs["input_ids"][call.mask].tolist()


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_a_checkpoint_s_passes_are_the_same_on_any_number_of_ranks(
    family: str, writers: int
) -> None:
    """Micro-batch m is rank m mod world_size's. Ranks with one less make a pass without tokens, for the collectives."""
    model = live(family)
    written: list[Any] = []
    for rank in range(writers):
        file = io.BytesIO()
        torch.save(make_passes(model, rank, writers).to_plain(), file)
        file.seek(0)
        written.append(torch.load(file, weights_only=True))
    for readers in (1, 2, 3, 5):
        model.world_size = readers
        for model.rank in range(readers):
            restored = KeptPasses(model)
            restored.restore(written)
            assert [step.tokens for step in restored.steps] == [7, 8]
            own = range(model.rank, MICRO_BATCHES, readers)
            empty = math.ceil(MICRO_BATCHES / readers) - len(own)
            for step, kept in enumerate(restored.steps):
                ids = [3 + step * MICRO_BATCHES + number for number in own]
                expected = [[i] * (SIZE * (WINDOW - 1)) for i in ids] + [[]] * empty
                for number in range(len(model.shape.family.layer_lists)):
                    assert [tokens_of(a_pass[number]) for a_pass in kept.passes] == expected
    restored.restore([])  # a step of an older format
    assert not restored.steps


def test_no_pass_is_kept_after_the_last_cut(tmp_path: Path) -> None:
    folder = make_tiny_llama(tmp_path, heads=4, kv_heads=4, hidden=32, ffn=48, layers=2, vocab=97)
    config = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1, cooldown_fraction=0.5)
    run = PlainRun(folder, fresh_lora(open_pretrained(folder).shape), config, steps=6)
    kept: list[int] = []
    for step, batch in enumerate(make_batches(steps=6, samples=6, tokens=8, vocab=97, seed=3), 1):
        run.step(step, batch)
        assert run.pruner.passes is not None
        kept.append(len(run.pruner.passes.passes()))
    assert run.cuts[-1].step == run.plan.last_cut
    assert kept[run.plan.last_cut - 2] > 0
    assert not any(kept[run.plan.last_cut - 1 :])
