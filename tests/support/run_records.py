"""A small made-up run for the tests of what a person looks at: 10 steps, cuts after steps 4 and 6, two ranks."""

from loraprune_ds.report.records import CutRecord, EvaluationRecord, History, StepRecord
from tests.support.shapes_and_scores import make_shape

LAYERS = ([(4, 96)] * 3, [(4, 96), (2, 40), (3, 50)])
DENSE, PRUNED = (
    make_shape(layers, hidden=64, head_dim=8, queries_per_group=2) for layers in LAYERS
)


def step_record(
    step: int, *, seconds: float = 1.0, loss: float = 3.0, skipped: bool = False
) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=1e-3,
        grad_norm=0.5,
        sparsity=0.0 if step <= 4 else 0.2 if step <= 6 else 0.3,
        tokens=4096,
        seconds=seconds,
        tokens_per_second=4096 / seconds,
        weight_bytes=[1000, 990],
        resident_bytes=[5_000_000_000 - step, 5_100_000_000 - step],
        skipped=skipped,
    )


def cut_record(step: int, *, before: int, after: int, reached: float) -> CutRecord:
    return CutRecord(
        step=step,
        target=reached + 0.003,
        reached=reached,
        removed_fraction=reached * 0.8,
        seconds=1.234,
        bytes_sent=3_400_000,
        weight_bytes_before=[before, before - 100],
        weight_bytes_after=[after, after - 100],
        heads=[4, 2, 3],
        channels=[96, 40, 50],
    )


def small_run() -> History:
    """Step times: 9 (warm-up), 2, 3, 2 | cut | 5, 5 | cut | 1, 1.5, 1, 1."""
    seconds = [9.0, 2.0, 3.0, 2.0, 5.0, 5.0, 1.0, 1.5, 1.0, 1.0]
    return History(
        steps=[step_record(i, seconds=s) for i, s in enumerate(seconds, start=1)],
        cuts=[
            cut_record(4, before=134_500_000, after=101_200_000, reached=0.25),
            cut_record(6, before=101_200_000, after=90_000_000, reached=0.297),
        ],
        evaluations=[
            EvaluationRecord(0, "dense", 51.59, 20320, 160),
            EvaluationRecord(6, "after_last_cut", 103.2, 20320, 160),
            EvaluationRecord(8, "step", 80.0, 20320, 160),
            EvaluationRecord(10, "pruned", 74.23, 20320, 160),
        ],
    )
