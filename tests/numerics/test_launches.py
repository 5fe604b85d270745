"""Launches and waits of the host that pruning adds, as exact numbers on every engine.

They are counted on the simulated device (tests/support/counting.py), for layers that all lose groups of both kinds.
"""

import pytest

from tests.support import device
from tests.support.counting import Case, added
from tests.support.families import heavy
from tests.support.ranks import RankPool

pytestmark = pytest.mark.skipif(device.MISSING is not None, reason=str(device.MISSING))

# Of a step. Score: 7 for each layer of `fisher`, as 4 squares and sums of its inputs' gradients, a mask of padding, and
# 2 that autograd adds up. 9 for each of 7 linears of `lora`: the weight's gradient from LoRA's factors, the product
# with the weight, and sums by group. The rest adds, checks and averages flat vectors of all layers.
FISHER, FISHER_REST = 7, 23
LORA, LORA_REST = 9 * 7, 29
# a refit keeps the ids of the pass, and its mask
KEPT_PASS = 2
# Of a cut: 7 weights and 7 factors of LoRA lose rows or columns, as do 2 moments of these factors. 3 are indices. The
# rest is the average of the scores.
CUT, CUT_REST = 7 + 7 + 2 * 7 + 3, 5
# Of a refit, 2 linears for each layer: the moments from their half, a Cholesky solution, and what it replaces.
REFIT, REFIT_REST = 2 * 29, 1
LINEARS, PASSES = 2, 3  # that a refit measures in a layer, and repeats


def _cases(engine: str, layers: int) -> list[Case]:
    """Returns `fisher`, `lora`, and `fisher` with a refit."""
    of_criteria = [("fisher", False), ("lora", False), ("fisher", True)]
    return [Case(engine, criterion, refit, layers) for criterion, refit in of_criteria]


@pytest.mark.parametrize("layers", [6, heavy(12)])
def test_one_process_launches(device_ranks: RankPool, layers: int) -> None:
    """The limits are 6 % of PEFT alone, 35 %, 40 a layer, 60 a layer, and 4 for each linear and pass."""
    ((fisher, lora, refit),) = device_ranks.run(1, added, *_cases("one", layers))
    assert fisher.step[0] == FISHER * layers + FISHER_REST
    assert lora.step[0] == LORA * layers + LORA_REST
    assert refit.step[0] == fisher.step[0] + KEPT_PASS
    assert fisher.step[0] <= 0.06 * fisher.alone[0]
    assert lora.step[0] <= 0.35 * lora.alone[0]
    assert fisher.cut[0] == lora.cut[0] == CUT * layers + CUT_REST <= 40 * layers
    # one matrix product for each linear and pass
    assert refit.moments == LINEARS * PASSES * layers
    solved = refit.cut[0] - refit.moments - fisher.cut[0]
    assert solved == REFIT * layers + REFIT_REST <= 60 * layers
    # the exchange of numbers; the scores for the choice; the check of each solution
    assert (fisher.step[1], lora.step[1], refit.step[1]) == (1, 1, 1)
    assert (fisher.cut[1], lora.cut[1], refit.cut[1]) == (1, 1, 1 + LINEARS * layers)


LAYERS = 4  # two on each rank, in two rounds of a refit
ROUNDS = 2
OBJECTS_OF_REFIT = 2 * ROUNDS + 1  # whether all ranks could measure and solve, and may go on
# Launches that a step adds by `fisher` and `lora`, those of a cut on both ranks, and of a refit besides. DDP's are one
# process's. FSDP2 makes one tensor of LoRA's parts, which travel, and splits them. ZeRO-3 has its gradients flat.
LAUNCHES: dict[str, tuple[int, int, list[int], int]] = {
    "ddp": (51, 281, [129, 129], 121),
    "fsdp2": (51, 285, [137, 169], 141),
    "zero3": (48, 281, [192, 192], 137),
}
# Waits of a step: the exchange of numbers, and on ZeRO-3 its streams.
# Of a cut: the scores, whether all ranks can cut, and how long it took; FSDP2's rows; ZeRO-3's lay-out and streams.
WAITS = {"ddp": (1, 3), "fsdp2": (1, 4), "zero3": (2, 5)}
STREAMS = {"ddp": 0, "fsdp2": 0, "zero3": ROUNDS + 1}  # of a refit


@pytest.mark.parametrize("engine", [heavy("ddp"), "fsdp2", "zero3"])
def test_two_ranks_launch(device_ranks: RankPool, engine: str) -> None:
    by_rank = device_ranks.run(2, added, *_cases(engine, LAYERS))
    fisher, lora, refit = zip(*by_rank, strict=True)
    by_fisher, by_lora, cuts, solved = LAUNCHES[engine]
    in_step, in_cut = WAITS[engine]
    assert [x.step[:2] for x in fisher] == [(by_fisher, in_step)] * 2
    assert [x.step[:2] for x in lora] == [(by_lora, in_step)] * 2
    assert [x.step[:2] for x in refit] == [(by_fisher + KEPT_PASS, in_step)] * 2
    assert (
        [x.cut[:2] for x in fisher] == [x.cut[:2] for x in lora] == [(cut, in_cut) for cut in cuts]
    )
    assert in_cut <= 6
    # each rank measures all linears, and solves those of its own layers
    linears = LINEARS * LAYERS
    waits = linears // 2 + OBJECTS_OF_REFIT + STREAMS[engine]
    assert waits <= 2 * linears
    moments = PASSES * linears
    assert [x.moments for x in refit] == [moments] * 2
    assert [x.cut[:2] for x in refit] == [(cut + moments + solved, in_cut + waits) for cut in cuts]
