"""Prunes a model while somebody else's loop trains it.

The loop's own calls stay as they are. Around each optimizer step stand two more:

    pruning = Pruning.attach(model, optimizer, PruneConfig(ratio=0.3), steps=100)
    for batch in batches:
        pruning.begin_step()
        ...                     forward and backward passes, the optimizer's update
        del loss, outputs       a live graph remembers the sizes from before a cut
        pruning.end_step()

Scores are taken where ZeRO-3 has averaged the gradients and not yet clipped them: right before its own update
(`before_each_update`). A cut follows at the end of the step.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraprune_ds.config import PruneConfig
from loraprune_ds.errors import UserError, require
from loraprune_ds.hf.checkpoint import PruningCheckpoint, save_pruning
from loraprune_ds.hf.checks import check_model, warn_of_rounded_gradients
from loraprune_ds.hf.export import save_base, save_merged
from loraprune_ds.hf.forward import ForwardWatch
from loraprune_ds.hf.live import base_dtype, base_shape, find_peft_model, live_shape
from loraprune_ds.hf.report import write_results
from loraprune_ds.hf.training import PrunedTraining
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.schedule import make_schedule
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.pruning.target import find_ratio
from loraprune_ds.report.records import CutRecord, Sink, StepRecord, cut_record, show_pictures
from loraprune_ds.zero.ds_config import check_reshardable
from loraprune_ds.zero.foreign import (
    before_each_update,
    find_zero_optimizer,
    gradient_norm,
    reduced_dtypes,
    share_model,
)
from loraprune_ds.zero.memory import gather_weight_bytes, resident_bytes
from loraprune_ds.zero.optimizer import decide

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Update:
    """Holds what is known of a step right before its update.

    Attributes:
        tokens: that the model has read in training, of all ranks.
        resident_bytes: memory in use now: (world_size,).
        skipped: the gradients overflowed in fp16.
    """

    learning_rate: float
    tokens: int
    resident_bytes: list[int]
    skipped: bool


class Pruning:
    """Scores and cuts a model whose training belongs to somebody else.

    Attributes:
        training: what is pruned, and how far it is.
    """

    def __init__(self, training: PrunedTraining, sinks: Sequence[Sink]) -> None:
        self.training = training
        self._model, self._pruner, self._sinks = training.model, training.pruner, sinks
        self._weight_bytes = gather_weight_bytes(self._model)
        self._forward = ForwardWatch(training)
        self._recording = ExitStack()
        self._began = 0.0
        self._update: _Update | None = None
        self._take_back = before_each_update(self._model.zero_optimizer, self._score)

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        optimizer: Any,
        config: PruneConfig,
        steps: int,
        *,
        seed: int = 0,
        checkpoint: PruningCheckpoint | None = None,
        ds_config: dict[str, Any] | None = None,
        sinks: Sequence[Sink] = (),
    ) -> "Pruning":
        """Checks a model that is ready to train on ZeRO-3, and prunes it from now on. Collective.

        Args:
            model: DeepSpeed's engine, or the PEFT model inside it.
            optimizer: what `accelerator.prepare` or `deepspeed.initialize` returned.
            steps: optimizer steps of the whole training. The schedule is a fraction of them.
            seed: of criterion `random`.
            checkpoint: what `cut_to_checkpoint` returned, to go on from there.
            ds_config: DeepSpeed's JSON, if `model` is not the engine.
            sinks: get every record, on rank 0.

        Raises:
            UserError: the model, its LoRA, its optimizer or its DeepSpeed config cannot be pruned. Or the checkpoint
                is of other steps or of another seed.
        """
        if checkpoint:
            checkpoint.check(steps, seed)
        zero, peft_model = find_zero_optimizer(optimizer), find_peft_model(model)
        raw = ds_config or getattr(model, "config", None)
        if isinstance(raw, dict):
            check_reshardable("the DeepSpeed config", raw, {p.element_size() for p in peft_model.parameters()})
        check_model(peft_model, base_shape(peft_model))
        shared = share_model(peft_model, zero, live_shape(peft_model))
        dense = checkpoint.dense if checkpoint else shared.shape
        limits = make_limits(config, dense, find_ratio(config, dense))
        pruner = Pruner(shared, config, make_schedule(config, steps, limits), limits, seed)
        training = PrunedTraining(peft_model, shared, pruner, base_dtype(peft_model, dense), steps, seed)
        if checkpoint:
            checkpoint.restore(training)
        if shared.rank == 0:
            warn_of_rounded_gradients(reduced_dtypes(zero))
        return cls(training, sinks if shared.rank == 0 else ())

    @property
    def cuts(self) -> list[CutRecord]:
        """The cuts so far."""
        return self.training.history.cuts

    @property
    def reached(self) -> float:
        """The fraction of the dense decoder-layer linear parameters that is gone."""
        return self._pruner.reached()

    def begin_step(self) -> None:
        """Begins an optimizer step. Call it before the first forward pass of the step.

        Raises:
            UserError: the last step was not ended.
        """
        step = self.training.step + 1
        require(not self._forward.active, f"begin_step was called twice in step {step}, without end_step between")
        self._forward.active, self._update, self._began = True, None, time.perf_counter()
        self._recording.enter_context(self._pruner.record_step(step))

    def end_step(self, loss: float = math.nan) -> CutRecord | None:
        """Ends an optimizer step, and cuts the model if the schedule says so. Call it after the update. Collective.

        No loss graph may be alive.

        Args:
            loss: of the step, for the records.

        Raises:
            UserError: the optimizer made no update since `begin_step`.
            RunError: as `Pruner.cut`.
        """
        step, update = self.training.step + 1, self._update
        if update is None:
            raise UserError(f"end_step was called in step {step}, but the optimizer has made no update")
        self._recording.close()
        self._forward.active, self._update = False, None
        self.training.step = step
        self._record_step(update, loss)
        before = self._weight_bytes
        cut = self._pruner.cut(step, scored=not update.skipped)
        if cut is None:
            return None
        self._weight_bytes = gather_weight_bytes(self._model)
        record = cut_record(cut, self._pruner.limits.dense, self._model, before, self._weight_bytes)
        self.cuts.append(record)
        self._tell(record)
        return record

    def save(self, folder: str | Path) -> None:
        """Writes beside a trainer's checkpoint what `cut_to_checkpoint` needs to go on from it. Collective.

        Raises:
            RunError: a rank cannot write.
        """
        save_pruning(self.training, Path(folder))

    def save_model(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes the pruned model with LoRA merged in. It is stock where the layers are uniform. Collective.

        Raises:
            UserError: the folder exists and is not empty.
        """
        save_merged(self.training, Path(folder), tokenizer)

    def save_base(self, folder: str | Path, adapter: str | Path | None = None, tokenizer: Any = None) -> None:
        """Writes the pruned base without LoRA. Collective.

        Args:
            adapter: folder of the adapter that was saved, which then names this base.

        Raises:
            UserError: the folder exists and is not empty, or the adapter's folder has no adapter.
        """
        save_base(self.training, Path(folder), None if adapter is None else Path(adapter), tokenizer)

    def write_results(self, folder: str | Path, settings: dict[str, Any] | None = None) -> None:
        """Writes report, kept groups, metrics and pictures, as a run of ours has them. Collective.

        Reporters get the pictures, too.

        Args:
            settings: more entries of the report's config.
        """
        show_pictures(self._sinks, write_results(self.training, Path(folder), settings or {}))

    def close(self) -> None:
        """Lets go of the model and its optimizer. Warns if not all cuts were made."""
        step, end = self.training.step, self._pruner.schedule.last_cut
        if step < end and self._model.rank == 0:
            removed = f"{100 * self.reached:.1f} % of {100 * self._pruner.schedule.ratio:.1f} % are removed"
            log.warning("training stopped at step %d, before the last cut at step %d: %s", step, end, removed)
        self._take_back()
        self._forward.close()
        for sink in self._sinks:
            sink.close()

    def _score(self) -> None:
        """Looks at the averaged gradients of all ranks and scores them, unless they overflowed in fp16. Collective."""
        step = self.training.step + 1
        require(self._forward.active, f"step {step}: the optimizer made an update, but begin_step was not called")
        require(self._update is None, f"step {step}: the optimizer made two updates between begin_step and end_step")
        bad_layer = self._model.nonfinite_layer()
        mine = [-1 if bad_layer is None else bad_layer, self._forward.take_tokens(), resident_bytes()]
        rows = self._model.comm.all_gather(torch.tensor(mine, dtype=torch.int64, device=self._model.device)).tolist()
        bad_layers = [None if row[0] < 0 else row[0] for row in rows]
        skipped = decide(bad_layers, [], dtype=self.training.dtype, step=step) == "skip"
        if not skipped:
            self._pruner.score(step)
        rate = float(self._model.zero_optimizer.optimizer.param_groups[0]["lr"])
        self._update = _Update(rate, sum(row[1] for row in rows), [row[2] for row in rows], skipped)

    def _record_step(self, update: _Update, loss: float) -> None:
        seconds = time.perf_counter() - self._began
        record = StepRecord(
            step=self.training.step,
            loss=loss,
            learning_rate=update.learning_rate,
            grad_norm=None if update.skipped else gradient_norm(self._model.zero_optimizer),
            sparsity=self.reached,
            tokens=update.tokens,
            seconds=seconds,
            tokens_per_second=update.tokens / seconds,
            weight_bytes=self._weight_bytes,
            resident_bytes=update.resident_bytes,
            skipped=update.skipped,
        )
        self.training.history.steps.append(record)
        self._tell(record)

    def _tell(self, record: StepRecord | CutRecord) -> None:
        for sink in self._sinks:
            sink.write(record)
