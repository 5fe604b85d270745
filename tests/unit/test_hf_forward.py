"""What the callback sees of somebody else's training: forward passes that train, and the update, until it lets go."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from loraprune_ds.errors import UserError
from loraprune_ds.hf.forward import ForwardWatch
from loraprune_ds.hf.pruning import Pruning
from loraprune_ds.report.records import History
from loraprune_ds.train.recorder import Recorder
from loraprune_ds.zero.foreign import before_each_update
from tests.unit.test_hf_refusals import adapted

IDS = torch.arange(8).view(2, 4)
PADDED = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


class Watched:
    """A tiny model in training, its watch, the masks that were recorded, and how often the trace was forgotten."""

    def __init__(self) -> None:
        self.model, self.masks, self.forgotten = adapted(), list[Tensor | None](), 0
        device = next(self.model.parameters()).device
        sharded = SimpleNamespace(device=device, forget_trace=self._forget)
        training = SimpleNamespace(model=sharded, pruner=self, peft_model=self.model)
        self.watch = ForwardWatch(cast(Any, training))
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


class Attached:
    """A `Pruning` over stand-ins. `before` is what it does right before an update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, overflow: bool) -> None:
        self.scored: list[bool] = []
        self.let_go: list[str] = []
        watch = SimpleNamespace(active=False, take_tokens=lambda: 5, close=lambda: self.let_go.append("forward"))
        monkeypatch.setattr("loraprune_ds.hf.pruning.ForwardWatch", lambda _: watch)
        monkeypatch.setattr("loraprune_ds.train.trainer.gather_weight_bytes", lambda _: [1])
        monkeypatch.setattr("loraprune_ds.hf.pruning.gradient_norm", lambda _: 1.0)
        monkeypatch.setattr("loraprune_ds.hf.pruning.before_each_update", self._before_each_update)
        sharded = SimpleNamespace(
            nonfinite_layer=lambda: 0 if overflow else None,
            comm=SimpleNamespace(all_gather=lambda row: row[None]),
            device="cpu",
            rank=0,
            zero_optimizer=SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}])),
        )
        pruner = SimpleNamespace(
            record_step=lambda _: nullcontext(),
            score=lambda _: None,
            cut=lambda _, scored: self.scored.append(scored),
            reached=lambda: 0.0,
            schedule=SimpleNamespace(last_cut=0),
        )
        recorder = Recorder(History(), [])
        training = SimpleNamespace(model=sharded, pruner=pruner, step=0, dtype="float16", recorder=recorder)
        self.pruning = Pruning(cast(Any, training))

    def _before_each_update(self, _: Any, action: Any) -> Any:
        self.before = action
        return lambda: self.let_go.append("update")


@pytest.mark.parametrize("overflow", [False, True])
def test_a_step_that_overflowed_gives_no_scores(monkeypatch: pytest.MonkeyPatch, *, overflow: bool) -> None:
    attached = Attached(monkeypatch, overflow=overflow)
    attached.pruning.begin_step()
    attached.before()
    attached.pruning.end_step()
    assert attached.scored == [not overflow]
    attached.pruning.close()
    assert sorted(attached.let_go) == ["forward", "update"]


def test_calls_out_of_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    attached = Attached(monkeypatch, overflow=False)
    with pytest.raises(UserError, match="made an update, but begin_step was not called"):
        attached.before()
    attached.pruning.begin_step()
    with pytest.raises(UserError, match="begin_step was called twice in step 1"):
        attached.pruning.begin_step()
    with pytest.raises(UserError, match="end_step was called in step 1, but the optimizer has made no update"):
        attached.pruning.end_step()
    attached.before()
    with pytest.raises(UserError, match="made two updates between begin_step and end_step"):
        attached.before()
