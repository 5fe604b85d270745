"""A training under pruning, one optimizer step after another. Whoever trains makes these calls:

    session.begin_step()
    with session.record_forward(mask):          for each micro-batch; a refit keeps its ids
        loss = model(...)
    loss.backward()
    session.exchange(loss); session.score()     right before the update
    optimizer.step()
    session.end_step(loss)                      records the step, and cuts if a cut is due

Our trainer makes them all (train/trainer.py). In another loop, hooks make the calls in the middle (session/pruning.py).
"""

import math
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from loraprune_ds.checkpoint.load import SavedStep, keep_to_lists
from loraprune_ds.checkpoint.save import Staging, write_step
from loraprune_ds.checkpoint.state import Origin, State
from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import fail_point
from loraprune_ds.files import JsonObject
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.step import Cut, Pruner
from loraprune_ds.ranks.device import StepPeak, device_name, is_cpu, peak_flops, trim_heap
from loraprune_ds.report import records
from loraprune_ds.session.exchange import RankNumbers, can_update, exchange_numbers, find_bad_layers
from loraprune_ds.session.state import describe_resume, lora_scalings, storage_formats, sum_up


class PruningSession:
    """Scores, cuts and records a model while it trains.

    Args:
        dtype: of the frozen weights.
        origin: what the training began with.
        own_process: the training has the process for itself, so the peak memory of each step is measured.

    Attributes:
        step: the last completed step.
        weight_bytes: of each rank: (world_size,).
        scored: whether the last step's gradients were finite.
    """

    def __init__(
        self,
        model: PrunableModel,
        schedule: Schedule,
        dtype: Dtype,
        *,
        origin: Origin,
        recorder: records.Recorder,
        own_process: bool = False,
    ) -> None:
        self.model = model
        self.dtype: Dtype = dtype
        self.origin = origin
        self.pruner = Pruner(model, schedule, origin.seed)
        self.recorder = recorder
        self.step = 0
        self.resumed_from: list[int] = []
        self.weight_bytes = model.weight_bytes()
        self.scored = False
        self.peak = StepPeak()
        self._own_process = own_process
        self._peak_flops = peak_flops(device_name(), dtype) if own_process else None
        self._recording = ExitStack()
        self._began = 0.0
        self._learning_rate = 0.0
        self._numbers: RankNumbers | None = None  # of the open step, once it was exchanged
        self._nothing = torch.zeros((), dtype=torch.float64, device=model.device)

    @property
    def schedule(self) -> Schedule:
        return self.pruner.schedule

    @property
    def cuts(self) -> list[records.CutRecord]:
        return self.recorder.history.cuts

    @property
    def reached(self) -> float:
        """The removed fraction of the dense decoder-layer linear parameters."""
        return self.pruner.reached()

    @property
    def exchanged(self) -> bool:
        """Whether the ranks know how the open step went."""
        return self._numbers is not None

    def begin_step(self) -> None:
        """Begins an optimizer step, before its first forward pass."""
        self._began = time.perf_counter()
        self._numbers = None
        if self._own_process:
            self.peak.begin()
        self._recording.enter_context(self.pruner.record_step(self.step + 1))

    def record_forward(self, *masks: Tensor | None) -> AbstractContextManager[None]:
        """Records one micro-batch, around its forward pass alone. `masks` as in `KeptPasses.record_forward`."""
        return self.pruner.record_forward(*masks)

    def exchange(
        self, loss: Tensor | None = None, tokens: Tensor | None = None, request: int = 0
    ) -> RankNumbers:
        """Tells all ranks how this rank's passes went, after the last backward pass. Collective.

        Args:
            loss: this rank's part of the loss, one fp64 number on the device. None if the loop does not know it.
            tokens: of this rank's passes, likewise.
            request: to stop or save (train/stop.py).

        Raises:
            RunError: a score of the step before is not finite.
        """
        groups: Any = cast(torch.optim.Optimizer, self.model.optimizer).param_groups
        self._learning_rate = float(groups[0]["lr"])  # before the update changes it
        given = [
            self._nothing if number is None else number
            for number in (loss, tokens, self.pruner.unchecked)
        ]
        numbers = exchange_numbers(self.model, *given, peak=self.peak.of_step(), request=request)
        self.pruner.check(numbers.scores[0])
        self._numbers = numbers
        return numbers

    def score(self) -> None:
        """Scores the groups, if due and all gradients are finite, right before the update.

        Raises:
            RunError: the loss is not finite, or a gradient is not and no loss scaler leaves out the update.
        """
        step = self.step + 1
        numbers = cast(RankNumbers, self._numbers)
        bad_layers = find_bad_layers(self.model, numbers)
        skips = self.model.skips_updates
        self.scored = can_update(bad_layers, numbers.losses, skips=skips, step=step)
        if self.scored:
            self.pruner.score(step)
        self._recording.close()

    def end_step(
        self, loss: float = math.nan, *, tokens: int | None = None, flops: float | None = None
    ) -> records.CutRecord | None:
        """Records an optimizer step after its update, and cuts the model if a cut is due. Collective.

        Args:
            loss: mean over the global batch.
            tokens: of the global batch, without padding. Default: those that the ranks exchanged.
            flops: that the global batch needed (model/shape.py), for the MFU.

        Raises:
            RunError: see `Pruner.cut`.
        """
        seconds = time.perf_counter() - self._began
        numbers = cast(RankNumbers, self._numbers)
        grad_norm = self.model.layout.norm(numbers.gradient_norms) if self.scored else None
        self._recording.close()
        self._numbers = None
        self.step += 1
        if tokens is None:
            tokens = sum(numbers.tokens)
        self.pruner.note_tokens(tokens)
        mfu = None
        if self._peak_flops is not None and flops is not None:
            mfu = flops / seconds / self._peak_flops / self.model.world_size
        peak_bytes: list[int] = []
        reserved_bytes: list[int] = []
        if self._own_process:
            peak_bytes = numbers.peak_bytes
            if not is_cpu():
                reserved_bytes = numbers.reserved_bytes
        self.recorder.write(
            records.StepRecord(
                step=self.step,
                loss=loss,
                learning_rate=self._learning_rate,
                grad_norm=grad_norm,
                sparsity=self.reached,
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                weight_bytes=self.weight_bytes,
                resident_bytes=numbers.resident_bytes,
                skipped=not self.scored,
                peak_bytes=peak_bytes,
                reserved_bytes=reserved_bytes,
                mfu=mfu,
            )
        )
        return self.cut()

    def cut(self) -> records.CutRecord | None:
        """Cuts the model if the schedule says so, and records it. Collective."""
        cut = self.pruner.cut(self.step, scored=self.scored)
        if cut is None:
            return None
        weight_bytes_before = self.weight_bytes
        self.weight_bytes = self.model.weight_bytes()
        trim_heap()
        record = self._describe(cut, weight_bytes_before)
        self.recorder.write(record)
        return record

    def restore(self, saved: SavedStep) -> None:
        """Goes on from a saved step. The model matches it already."""
        saved.restore_pruner(self.pruner)
        self.step = saved.state.step
        self.resumed_from = [*saved.state.resumed_from, self.step]

    def state(self) -> State:
        """Describes the training after this step. Collective."""
        model = self.model
        trained = list(chain.from_iterable(model.trained_parameters()))
        scalings = lora_scalings(model)
        ((most_common, _),) = Counter(scalings.values()).most_common(1)
        others = {name: scaling for name, scaling in scalings.items() if scaling != most_common}
        return State(
            step=self.step,
            origin=self.origin,
            kept=keep_to_lists(self.pruner.kept_of_dense, model.shape.kinds),
            engine=model.engine,
            world_size=model.world_size,
            scaling=most_common,
            scalings=others,
            formats=storage_formats(model.layers, model.shape),
            trained=trained,
            asked=self.schedule.ratio,
            totals=sum_up(self.recorder.history, self.step),
            resumed_from=self.resumed_from,
            accelerator=device_name(),
            peak_bytes=model.comm.gather_objects(self.peak.of_process()),
        )

    def save_step(
        self,
        target: Path,
        kind: str,
        *,
        schedule: JsonObject | None = None,
        loss_scale: JsonObject | None = None,
        with_records: bool = False,
    ) -> None:
        """Publishes the folder of this step, which every rank fills. Collective.

        Args:
            kind: of the folder, in the names of fail points.
            schedule: state of the learning-rate schedule, if the loop does not save it.
            loss_scale: state of fp16's loss scaler, likewise.
            with_records: adds metrics.jsonl.

        Raises:
            RunError: a rank cannot write, or a score is not finite.
        """
        self.pruner.check()
        state = self.state()
        resume = describe_resume(self.pruner, schedule or {}, loss_scale or {})
        with Staging(self.model.comm, target, kind) as staging:
            if with_records and self.model.rank == 0:
                history = self.recorder.history
                staging.write(
                    records.METRICS_FILE, lambda path: records.write_history(path, history)
                )
            write_step(staging, self.pruner, self.model.optimizer_state, state, resume)
            fail_point(f"save.{kind}_written")
            staging.publish()

    def _describe(self, cut: Cut, weight_bytes_before: list[int]) -> records.CutRecord:
        pruned = self.model.shape
        first = self.pruner.limits.dense.first
        kept = {kind: [layer[kind] for layer in pruned.counts] for kind in pruned.kinds}
        return records.CutRecord(
            step=cut.step,
            target=cut.target,
            reached=cut.reached,
            removed_fraction=1 - pruned.total_numel() / first["parameters"],
            seconds=cut.seconds,
            bytes_sent=cut.bytes_sent,
            weight_bytes_before=weight_bytes_before,
            weight_bytes_after=self.weight_bytes,
            **kept,
        )
