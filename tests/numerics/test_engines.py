"""What every engine must do for the pruner, on one rank and on two. Each is in a loop as its users write it.

An expected tensor is a slice of what was there before, bit by bit. An expected gradient comes from autograd on one
whole model with all samples. It adds the same numbers in another order, so 1e-5 of the largest is a wide margin.
"""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.oracle.models import ODD_SIZES, make_tiny_llama
from tests.support import engines
from tests.support.engines import ENGINES, Found
from tests.support.local_training import make_model
from tests.support.ranks import RankPool

CASES = [(name, world_size) for name in ENGINES for world_size in (1, 2)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), biases=True, **ODD_SIZES)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


@pytest.fixture(scope="module")
def found(ranks: RankPool, folder: Path, case: tuple[str, int]) -> list[Found]:
    """What each rank saw of one training."""
    name, world_size = case
    return ranks.run(world_size, engines.train, name, folder)


@pytest.fixture(scope="module")
def gradients(folder: Path) -> dict[str, Tensor]:
    """Computes those of the first step in one process, without an engine."""
    model = make_model(folder).train()
    ids = engines.batch(1)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_an_engine_names_itself(found: list[Found], case: tuple[str, int]) -> None:
    assert {x.engine for x in found} == {case[0]}


def test_gradients_are_averaged_and_not_clipped(
    found: list[Found], gradients: dict[str, Tensor]
) -> None:
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for rank in found:
        assert rank.gradients.keys() == gradients.keys()
        for name, expected in gradients.items():
            assert (rank.gradients[name] - expected).abs().max() < TOLERANCE * largest, name
    norm = math.sqrt(sum(float(x.square().sum()) for x in gradients.values()))
    assert norm > 100 * engines.MAX_NORM
    assert [rank.norms[0] for rank in found] == pytest.approx([norm] * len(found), rel=TOLERANCE)


def test_a_cut_keeps_slices_of_weights_masters_and_moments(
    found: list[Found], folder: Path
) -> None:
    before, after = found[0].before, found[0].after
    expected = engines.sliced(folder, before)
    cut = [name for name, tensor in expected.items() if tensor.shape != before[name].shape]
    # per cut layer: 7 weights, 5 biases, 7 factors of LoRA. These have a master and two moments
    assert len(cut) == 2 * (7 + 5 + 7 * 4)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


def test_a_cut_frees_weights_and_moments(found: list[Found], case: tuple[str, int]) -> None:
    before, after = found[0].before, found[0].after
    name, world_size = case
    copies = world_size if name == "local" else 1
    padding = 4 * world_size * len(before)
    for tensors, held in zip((before, after), found[0].weight_bytes, strict=True):
        weights = copies * bytes_of(tensors, moments=False)
        assert weights <= sum(held) <= weights + padding
    moments = bytes_of(before, moments=True) - bytes_of(after, moments=True)
    for number, rank in enumerate(found):
        weights = rank.weight_bytes[0][number] - rank.weight_bytes[1][number]
        assert weights > padding
        assert rank.freed >= weights + copies * moments / world_size - padding


def bytes_of(tensors: dict[str, Tensor], *, moments: bool) -> int:
    chosen = [x for name, x in tensors.items() if ("/exp" in name) is moments and "/m" not in name]
    return sum(x.nbytes for x in chosen)


def test_training_goes_on_after_a_cut_as_in_one_process(
    ranks: RankPool, folder: Path, found: list[Found]
) -> None:
    alone = ranks.run(1, engines.train, "local", folder)[0]
    assert alone.losses[2] != alone.losses[1]
    for rank in found:
        assert rank.losses == pytest.approx(alone.losses, rel=TOLERANCE)


def test_a_saved_state_comes_back_bit_by_bit(found: list[Found]) -> None:
    """After another step changed it, and LoRA with it."""
    rank = found[0]
    changed = [name for name, x in rank.trained.items() if not torch.equal(x, rank.after[name])]
    # LoRA, its master and moments: of all layers
    assert len(changed) == 3 * 7 * 2 * 4
    assert rank.updates == {2}
    torch.testing.assert_close(rank.restored, rank.after, rtol=0, atol=0)


def test_every_rank_gets_a_weight_that_one_has_computed(found: list[Found]) -> None:
    assert found[0].overwritten is not None
    assert torch.equal(found[0].overwritten, engines.new_weight())


def test_each_element_is_scored_by_one_rank(found: list[Found]) -> None:
    """A sum over ranks would count it twice, which a normalisation hides."""
    parts = sorted((rank.owned for rank in found), key=lambda part: part[0])
    assert torch.equal(torch.cat([part for _, part in parts]), engines.new_weight().view(-1))


@pytest.fixture(scope="module")
def refitted_alone(ranks: RankPool, folder: Path) -> tuple[dict[str, Tensor], float]:
    _, after, loss = ranks.run(1, engines.refit, "local", folder)[0]
    return after, loss


def test_a_refit_repeats_the_passes_of_all_ranks(
    ranks: RankPool,
    folder: Path,
    case: tuple[str, int],
    refitted_alone: tuple[dict[str, Tensor], float],
) -> None:
    name, world_size = case
    before, after, loss = ranks.run(world_size, engines.refit, name, folder)[0]
    alone, loss_alone = refitted_alone
    changed = {key for key, tensor in before.items() if not torch.equal(tensor, after[key])}
    assert changed == {
        f"base_model.model.model.layers.{i}.{linear}.base_layer.weight"
        for i in engines.CUT_LAYERS
        for linear in ("self_attn.o_proj", "mlp.down_proj")
    }
    for key in changed:
        largest = (alone[key] - before[key]).abs().max()
        # Adam has divided rounding by the roots of tiny moments
        assert (after[key] - alone[key]).abs().max() < 1e-3 * largest, key
    assert loss == pytest.approx(loss_alone, rel=TOLERANCE)


def test_the_layer_of_a_nan_is_named_by_a_rank_that_has_it(found: list[Found]) -> None:
    good, poisoned = zip(*(rank.nonfinite for rank in found), strict=True)
    assert set(good) == {None}
    assert {layer for layer in poisoned if layer is not None} == {engines.LAYER}


def test_a_dense_model_is_cut_before_it_trains(
    ranks: RankPool, folder: Path, case: tuple[str, int]
) -> None:
    name, world_size = case
    engine, tensors = ranks.run(world_size, engines.cut_before_training, name, folder)[0]
    assert engine == name
    dense = {key: p.detach() for key, p in make_model(folder).named_parameters()}
    expected = engines.sliced(folder, dense)
    filled = f"base_model.model.model.layers.{engines.LAYER}.{engines.LINEAR}.base_layer.weight"
    expected[filled] = engines.new_weight()
    weights = {key: tensor for key, tensor in tensors.items() if "/" not in key}
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_a_step_that_zero_3_skips_in_fp16_is_not_scored(ranks: RankPool, folder: Path) -> None:
    for skipped in ranks.run(2, engines.overflow_on_zero_3, folder):
        assert (skipped[0], skipped[-1]) == (True, False)
