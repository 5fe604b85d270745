"""Several samples in one window: what each of them gives to the loss is what it gives alone. And batches by length."""

import pytest
import torch
from torch import Tensor

from loraprune_ds.config_file import config_from_dict
from loraprune_ds.model.family import FAMILIES
from loraprune_ds.model.token_loss import IGNORE_INDEX, with_token_losses
from loraprune_ds.train.data.samples import SampleOrder, Samples, best_fit, join_samples, pack_samples, starts_of
from tests.families import TINY, tiny_model
from tests.refusals import refused
from tests.unit.test_data import numbers

WINDOW, FLASH = 24, "flash_attention_2"
LENGTHS = [5, 17, 9, 24, 3, 11, 7, 2]
# The same sums in another order, and a softmax over masked scores: 6e-8 a term, of some hundred terms.
TOLERANCE = 2e-5


def make_samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (sum(LENGTHS),), generator=generator).int()
    labels = ids.masked_fill(torch.rand(len(ids), generator=generator) < 0.4, IGNORE_INDEX)
    return Samples({"input_ids": ids, "labels": labels}, starts_of(torch.tensor(LENGTHS)), WINDOW, left_out=1)


SAMPLES, PACKS = make_samples(), best_fit(LENGTHS, WINDOW)
PACKED = pack_samples(SAMPLES)


def everything(samples: Samples) -> dict[str, Tensor]:
    return samples.inputs(numbers(*range(len(samples))))


def test_every_sample_is_in_one_pack_and_no_pack_is_longer_than_the_window() -> None:
    lengths = torch.randint(1, 101, (2000,), generator=torch.Generator().manual_seed(1)).tolist()
    packs = best_fit(lengths, 100)
    assert sorted(sample for pack in packs for sample in pack) == list(range(2000))
    assert max(sum(lengths[sample] for sample in pack) for pack in packs) <= 100
    assert len(packs) <= 1.02 * sum(lengths) / 100
    assert best_fit([10, 10, 10], 10) == [[0], [1], [2]]
    assert best_fit([], 10) == []


def test_the_mask_is_off_at_padding() -> None:
    mask = SAMPLES.attention_mask(numbers(*range(len(SAMPLES))))
    assert mask is not None
    assert mask.sum(1).tolist() == LENGTHS
    assert SAMPLES.attention_mask(numbers(3)) is None  # a sample as long as the window


def test_a_pack_holds_its_samples_one_behind_the_other() -> None:
    inputs, alone = everything(PACKED), everything(SAMPLES)
    assert (len(PACKED), PACKED.left_out) == (len(PACKS), 1)
    for row, pack in enumerate(PACKS):
        assert inputs["position_ids"][row][: sum(LENGTHS[i] for i in pack)].tolist() == [
            position for i in pack for position in range(LENGTHS[i])
        ]
        ids = torch.cat([alone["input_ids"][i, : LENGTHS[i]] for i in pack])
        assert inputs["input_ids"][row, : len(ids)].equal(ids)
    assert PACKED.count_supervised(torch.arange(len(PACKED))) == SAMPLES.count_supervised(torch.arange(len(SAMPLES)))


def test_texts_of_a_pack_are_counted_one_by_one() -> None:
    """Tokens per second and MFU are counted in them."""
    found = PACKED.text_lengths(numbers(*reversed(range(len(PACKED)))))
    assert found == [LENGTHS[i] for pack in reversed(PACKS) for i in pack]
    columns = {name: torch.zeros(3).int() for name in ("input_ids", "labels", "position_ids")}
    one_token_each = Samples(columns, torch.tensor([0, 2, 3]), window=4)
    assert one_token_each.text_lengths(numbers(0, 1)) == [1, 1, 1]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", [family for family in TINY if FAMILIES[family].packs])
def test_losses_of_packed_samples_are_those_of_samples_alone(family: str, attention: str) -> None:
    if attention == "sdpa" and TINY[family].get("attn_logit_softcapping"):
        pytest.skip("sdpa cannot cap scores; such a family gets eager")
    model = with_token_losses(tiny_model(family, attn_implementation=attention), 5)
    with torch.no_grad():
        alone = torch.stack([model(**SAMPLES.inputs(numbers(i))).sum() for i in range(len(SAMPLES))])
        packed = model(**everything(PACKED)).sum(1)
        crossing = model(**{k: v for k, v in everything(PACKED).items() if k != "position_ids"}).sum(1)
    expected = torch.stack([alone[pack].sum() for pack in PACKS])
    assert ((packed - expected).abs() / expected).max() < TOLERANCE
    assert ((crossing - expected).abs() / expected).max() > 50 * TOLERANCE  # this test can fail


def test_windows_of_text_beside_packs_are_one_text_each() -> None:
    text = torch.arange(2 * WINDOW).int().view(2, WINDOW)
    both = everything(join_samples([Samples.of_windows(text), PACKED]))
    assert both["position_ids"][:2].tolist() == [list(range(WINDOW))] * 2
    assert both["position_ids"][2:].equal(everything(PACKED)["position_ids"])
    assert both["input_ids"][:2].equal(text.long())


def test_a_batch_by_length_has_the_same_samples_the_longest_first() -> None:
    lengths = SAMPLES.lengths()
    plain, sorted_ = SampleOrder(8, 4, 3), SampleOrder(8, 4, 3, lengths=lengths)
    for step in range(5):
        assert sorted(plain.batch(step).tolist()) == sorted(sorted_.batch(step).tolist())
        assert lengths[sorted_.batch(step)].tolist() == sorted(lengths[plain.batch(step)].tolist(), reverse=True)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"steps": 1, "group_by_length": True}}, "train.group_by_length has no effect on data.format text"),
        (
            {"data": {"path": "a", "format": "chat", "packing": True}, "model": {"attn_implementation": FLASH}},
            "data.packing with model.attn_implementation flash_attention_2 needs train.micro_batch_size 1",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(sections: dict[str, object], message: str) -> None:
    assert refused(config_from_dict, {"output_dir": "out"} | sections).startswith(message)
