"""The callback's view of a foreign training: forward passes that train, and the update, until it lets go."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from loraprune_ds.hf.live import ForwardWatch
from loraprune_ds.hf.pruning import Pruning
from loraprune_ds.report.records import History
from loraprune_ds.train.recorder import Recorder
from loraprune_ds.zero.external_engine import before_each_update
from tests.refusals import refuses
from tests.unit.test_hf_refusals import adapted

IDS = torch.arange(8).view(2, 4)
PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


class Watched:
    """A tiny model in training, its watch, the masks that were recorded, and how often the trace was forgotten."""

    def __init__(self) -> None:
        self.model, self.masks, self.forgotten = adapted(), list[Tensor | None](), 0
        device = next(self.model.parameters()).device
        sharded = SimpleNamespace(device=device, forget_trace=self._forget)
        self.watch = ForwardWatch(self.model, cast(Any, sharded), cast(Any, self))
        self.model.train()

    def record_forward(self, mask: Tensor | None) -> Any:
        self.masks.append(mask)
        return nullcontext()

    def _forget(self) -> None:
        self.forgotten += 1


def test_forward_passes_that_train_are_recorded_with_their_padding() -> None:
    watched = Watched()
    watched.watch.active = True
    watched.model(input_ids=IDS, attention_mask=PADDED)
    watched.model(input_ids=IDS)
    padded, whole = watched.masks
    assert padded is not None
    assert torch.equal(padded, PADDED.bool())
    assert whole is None
    assert watched.watch.take_tokens() == 6 + 8
    assert watched.watch.take_tokens() == 0


def test_references_evaluations_and_passes_between_steps_are_not_recorded() -> None:
    watched = Watched()
    watched.model(input_ids=IDS)  # no step is open
    watched.watch.active = True
    with torch.no_grad():
        watched.model(input_ids=IDS)
    assert (watched.masks, watched.forgotten) == ([], 0)
    watched.model.eval()
    watched.model(input_ids=IDS)
    watched.model(input_ids=IDS)
    assert (watched.masks, watched.forgotten) == ([], 1)
    watched.model.train()
    watched.model(input_ids=IDS)
    assert (len(watched.masks), watched.forgotten) == (1, 2)
    watched.watch.close()
    watched.model(input_ids=IDS)
    watched.model.eval()
    watched.model(input_ids=IDS)
    assert (len(watched.masks), watched.forgotten) == (1, 2)


def test_an_update_comes_after_the_scores_and_alone_when_pruning_has_let_go() -> None:
    calls: list[str] = []
    zero = SimpleNamespace(step=lambda: calls.append("update"))
    take_back = before_each_update(cast(Any, zero), lambda: calls.append("scores"))
    zero.step()
    take_back()
    zero.step()
    assert calls == ["scores", "update", "update"]


def attach(monkeypatch: pytest.MonkeyPatch, *, overflow: bool = False) -> tuple[Pruning, Mock, Callable[[], None]]:
    """Returns a `Pruning` over stand-ins, their parts, and what it does right before an update."""
    tokens, overflowed = torch.tensor(5.0), torch.tensor(float("inf") if overflow else 1.0)
    watch, update, pruner = Mock(active=False, take_tokens=lambda: tokens), Mock(), Mock(schedule=Mock(last_cut=0))
    model = Mock(device="cpu", rank=0, zero_optimizer=Mock(optimizer=Mock(param_groups=[{"lr": 0.1}])))
    model.gradient_sum.return_value, model.nonfinite_layer.return_value = overflowed, 0
    model.weight_bytes.return_value, model.comm.gather_objects = [1], lambda layer: [layer]
    model.comm.all_gather = lambda row: row[None]
    pruner.record_step, pruner.reached.return_value, pruner.cut.return_value = lambda _: nullcontext(), 0.0, None
    monkeypatch.setattr("loraprune_ds.hf.pruning.ForwardWatch", lambda *_: watch)
    monkeypatch.setattr("loraprune_ds.hf.pruning.gradient_norm", lambda _: 1.0)
    monkeypatch.setattr("loraprune_ds.hf.pruning.before_each_update", update)
    pruning = Pruning(Mock(), model, pruner, "float16", Recorder(History(), []), steps=9, seed=0)
    parts = Mock(pruner=pruner, let_go=[watch.close, update.return_value])
    return pruning, parts, update.call_args.args[1]


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_that_overflowed_gives_no_scores(monkeypatch: pytest.MonkeyPatch, *, overflow: bool) -> None:
    pruning, parts, before_update = attach(monkeypatch, overflow=overflow)
    pruning.begin_step()
    before_update()
    pruning.end_step(loss=3.0)
    parts.pruner.cut.assert_called_once_with(1, scored=not overflow)
    assert parts.pruner.score.called != overflow
    (record,) = pruning.recorder.history.steps
    assert (record.step, record.loss, record.tokens, record.skipped) == (1, 3.0, 5, overflow)
    assert record.grad_norm == (None if overflow else 1.0)
    pruning.close()
    assert all(let_go.called for let_go in parts.let_go)


def test_calls_out_of_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pruning, _, before_update = attach(monkeypatch)
    refuses("made an update, but begin_step was not called", before_update)
    pruning.begin_step()
    refuses("begin_step was called twice in step 1", pruning.begin_step)
    refuses("end_step was called in step 1, but the optimizer has made no update", pruning.end_step)
    before_update()
    refuses("made two updates between begin_step and end_step", before_update)
