"""A training under pruning, one optimizer step after another. Whoever trains makes these calls:

    pruning.begin_step()
    with pruning.record_forward(mask):          for each micro-batch; a refit keeps its ids
        loss = model(...)
    loss.backward()
    pruning.before_update(loss)                 scores the averaged gradients, before they are clipped
    optimizer.step()
    pruning.end_step(loss)                      records the step, and cuts if a cut is due

Our trainer makes all four (train/trainer.py). Another loop makes the first and the last. A watch makes the second, and
a hook before each update the third.
"""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.checkpoint.load import SavedStep
from loraprune_ds.checkpoint.save import Staging, write_step
from loraprune_ds.checkpoint.state import State
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.errors import UserError, fail_point, require
from loraprune_ds.files import JsonObject, read_json, remove_leftovers
from loraprune_ds.pretrained.adapters import ADAPTER_FILE, give_base
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.device import StepPeak, is_cpu, trim_heap
from loraprune_ds.report import records
from loraprune_ds.session.checkpoint import PruningCheckpoint
from loraprune_ds.session.compiled import check_not_compiled
from loraprune_ds.session.exchange import RankNumbers, can_update, exchange_numbers, find_bad_layers
from loraprune_ds.session.forward_watch import ForwardWatch
from loraprune_ds.session.joining import Beginning, join
from loraprune_ds.session.live import base_name
from loraprune_ds.session.state import (
    describe_cut,
    describe_resume,
    describe_state,
    warn_of_missing_cuts,
)


class Pruning:
    """Scores, cuts, records and exports a model while it trains: in one process, on DDP, ZeRO-3 or FSDP2.

    Args:
        model: DeepSpeed's engine, DistributedDataParallel, or the PEFT model inside, sharded or not, ready to train.
        optimizer: torch's, or returned by `accelerator.prepare` or `deepspeed.initialize`.
        steps: optimizer steps of the whole training. The schedule is a fraction of them.
        checkpoint: returned by `cut_to_checkpoint`.
        ds_config: DeepSpeed's JSON, if `model` is not the engine.
        tokenizer: for the models that will be saved. Whether it can be is tried now.
        scaler: your own `torch.amp.GradScaler`. That of accelerate is known.

    Attributes:
        step: the last completed step.
        weight_bytes: of each rank: (world_size,).
        scored: whether the last step's gradients were finite.

    Raises:
        UserError: a part of the training cannot be pruned, or the checkpoint has other steps or another seed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: PruneConfig,
        steps: int,
        *,
        seed: int = 0,
        checkpoint: PruningCheckpoint | None = None,
        ds_config: JsonObject | None = None,
        sinks: Sequence[records.Sink] = (),
        scaler: Any = None,
        tokenizer: Any = None,
    ) -> None:
        """Checks the model and attaches to it. Collective."""
        found = join(model, optimizer, config, steps, seed, checkpoint, ds_config, sinks, scaler)
        self._begin(found, checkpoint)
        self._export(None, tokenizer, merge=True)
        self._forward = ForwardWatch(self.pruner)
        self._hooks.callback(self._forward.close)
        act = self._before_update
        reads = config.criterion == "lora"
        self._hooks.callback(self.model.before_each_update(act, reads_gradients=reads))

    @classmethod
    def of_run(cls, beginning: Beginning, checkpoint: SavedStep | None = None) -> "Pruning":
        """Prunes for a loop that makes all four calls, and has the process for itself. No hook notes gradients.

        Args:
            checkpoint: to go on from. The model matches it already.
        """
        pruning = cls.__new__(cls)
        pruning._begin(beginning, checkpoint)
        return pruning

    def _begin(self, beginning: Beginning, checkpoint: SavedStep | None) -> None:
        model = beginning.model
        self.model = model
        self.peft_model = cast(PeftModel, model.module)
        self.dtype: Dtype = beginning.dtype
        self.origin = beginning.origin
        self.pruner = Pruner(model, beginning.schedule, self.origin.seed)
        self.recorder = beginning.recorder
        self.step = 0
        self.resumed_from: list[int] = []
        if checkpoint:
            checkpoint.restore_pruner(self.pruner)
            self.step = checkpoint.state.step
            self.resumed_from = [*checkpoint.state.resumed_from, self.step]
        self.weight_bytes = model.weight_bytes()
        self.scored = False
        self.peak = StepPeak()
        self._forward: ForwardWatch | None = None  # of another loop
        self._hooks = ExitStack()
        self._recording = ExitStack()
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

    def begin_step(self) -> None:
        """Begins an optimizer step, before its first forward pass. Raises UserError inside a step of another loop."""
        if self._forward is None:
            self.peak.begin()
        else:
            self._forward.begin(self.step + 1)
            check_not_compiled(self.peft_model)  # it may be by now
        self._began = time.perf_counter()
        self._numbers = None
        self._recording.enter_context(self.pruner.record_step(self.step + 1))

    def record_forward(self, *masks: Tensor | None) -> AbstractContextManager[None]:
        """Records one micro-batch, around its forward pass alone. `masks` as in `KeptPasses.record_forward`.

        Another loop may leave the call out. Masks are then read off the passes.
        """
        if self._forward is not None:
            return self._forward.know(masks)
        return self.pruner.record_forward(*masks)

    def before_update(
        self, loss: Tensor | None = None, tokens: Tensor | None = None, request: int = 0
    ) -> RankNumbers:
        """Tells all ranks how this rank's passes went, and scores the groups, if due. Collective.

        Call it after the last backward pass, before gradients are clipped.

        Args:
            loss: this rank's part of the loss, one fp64 number on the device. None if the loop does not know it.
            tokens: of this rank's passes, likewise.
            request: to stop or save (train/stop.py).

        Raises:
            RunError: the loss, a gradient that no loss scaler skips, or a score of the step before is not finite.
        """
        step = self.step + 1
        numbers = self._exchange(loss, tokens, request)
        if self._forward is not None:
            self._forward.check(sum(numbers.tokens), step)
        bad_layers = find_bad_layers(self.model, numbers)
        skips = self.model.skips_updates
        self.scored = can_update(bad_layers, numbers.losses, skips=skips, step=step)
        if self.scored:
            self.pruner.score(step)
        self._recording.close()
        return numbers

    def end_step(
        self, loss: float = math.nan, *, tokens: int | None = None
    ) -> records.CutRecord | None:
        """Records an optimizer step after its update, and cuts the model if a cut is due. Collective.

        Args:
            loss: mean over the global batch.
            tokens: of the global batch, without padding. Default: those that the ranks exchanged.

        Raises:
            UserError: the optimizer made no update since `begin_step`.
            RunError: see `Pruner.cut`.
        """
        numbers = self._numbers or self._expect_skip()
        if self._forward is not None:
            self._forward.active = False
        seconds = time.perf_counter() - self._began
        grad_norm = self.model.layout.norm(numbers.gradient_norms) if self.scored else None
        self._recording.close()
        self._numbers = None
        self.step += 1
        if tokens is None:
            tokens = sum(numbers.tokens)
        self.pruner.note_tokens(tokens)
        is_own = self._forward is None
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
                peak_bytes=numbers.peak_bytes if is_own else [],
                reserved_bytes=numbers.reserved_bytes if is_own and not is_cpu() else [],
            )
        )
        return self.cut()

    def cut(self) -> records.CutRecord | None:
        """Cuts the model if the schedule says so, and records it. Collective."""
        cut = self.pruner.cut(self.step, scored=self.scored)
        if cut is None:
            return None
        before = self.weight_bytes
        self.weight_bytes = self.model.weight_bytes()
        trim_heap()
        record = describe_cut(self.pruner, cut, before, self.weight_bytes)
        self.recorder.write(record)
        return record

    def _exchange(self, loss: Tensor | None, tokens: Tensor | None, request: int) -> RankNumbers:
        if self._forward is not None:
            tokens = self._forward.take_tokens()
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

    def _before_update(self) -> None:
        """Makes the call of another loop, which its optimizer makes."""
        step = self.step + 1
        forward = cast(ForwardWatch, self._forward)
        require(forward.active, f"step {step}: the optimizer made an update without a begin_step")
        require(
            self._numbers is None,
            f"step {step}: the optimizer made two updates between begin_step and end_step",
        )
        self.before_update()

    def _expect_skip(self) -> RankNumbers:
        """Ends a step without an update. Only a loss scaler may leave it out, as it saw an overflow. Collective."""
        numbers = None
        if self.model.skips_updates:
            numbers = self._exchange(None, None, 0)
        if numbers is None or all(map(math.isfinite, numbers.gradient_norms)):
            raise UserError(
                f"end_step was called in step {self.step + 1}, but the optimizer has made no update"
            )
        self.scored = False
        return numbers

    def state(self) -> State:
        """Describes the training after this step. Collective."""
        peaks = self.model.comm.gather_objects(self.peak.of_process())
        history = self.recorder.history
        return describe_state(
            self.pruner, self.origin, history, self.step, self.resumed_from, peaks
        )

    def save_step(
        self,
        target: Path,
        kind: str,
        *,
        schedule: JsonObject | None = None,
        with_records: bool = False,
    ) -> None:
        """Publishes the folder of this step, which every rank fills. Collective.

        Args:
            kind: of the folder, in the names of fail points.
            schedule: state of the learning-rate schedule, for the loop that goes on.
            with_records: adds metrics.jsonl.

        Raises:
            RunError: a rank cannot write, or a score is not finite.
        """
        self.pruner.check()
        state = self.state()
        resume = describe_resume(self.pruner, schedule or {})
        with Staging(self.model.comm, target, kind) as staging:
            if with_records and self.model.rank == 0:
                history = self.recorder.history
                staging.write(
                    records.METRICS_FILE, lambda path: records.write_history(path, history)
                )
            write_step(staging, self.pruner, state, resume)
            fail_point(f"save.{kind}_written")
            staging.publish()

    def save(self, folder: str | Path, schedule: JsonObject | None = None) -> None:
        """Completes a trainer's checkpoint for `cut_to_checkpoint`. Arguments and errors are as in `save_step`."""
        folder = Path(folder)
        if self.model.rank == 0:
            remove_leftovers(folder)
        self.save_step(folder / PRUNING_FOLDER, "pruning", schedule=schedule, with_records=True)

    def save_model(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes the pruned model with LoRA merged. Collective. Raises UserError if the folder is not empty."""
        self._export(Path(folder), tokenizer, merge=True)

    def save_base(
        self, folder: str | Path, adapter: str | Path | None = None, tokenizer: Any = None
    ) -> None:
        """Writes the pruned base without LoRA, and makes the adapter on disk name it as its base. Collective.

        PEFT alone then loads both, also LoRA of experts.

        Raises:
            UserError: the folder exists and is not empty, or the adapter's folder has no adapter.
        """
        if adapter is None:
            self._export(Path(folder), tokenizer, merge=False)
            return
        comm = self.model.comm
        path = Path(adapter)
        comm.on_rank_0(lambda: read_json(path / ADAPTER_FILE))
        self._export(Path(folder), tokenizer, merge=False)
        # the live adapter cannot: at each save PEFT reads its base's config with the class of the dense model
        shape = self.model.shape
        comm.write_on_rank_0(path, lambda: give_base(path, str(folder), shape))

    def write_results(self, folder: str | Path, settings: JsonObject | None = None) -> None:
        """Writes report, kept groups, metrics and pictures. `settings` also go into the report. Collective."""
        # importing the callback must not load matplotlib
        from loraprune_ds.session.results import write_results

        folder = Path(folder)
        config = {
            "seed": self.origin.seed,
            "steps": self.origin.steps,
            "model": {"path": base_name(self.peft_model), "dtype": self.dtype},
            "prune": asdict(self.pruner.config),
        }
        comm = self.model.comm
        metrics = folder / records.METRICS_FILE
        comm.write_on_rank_0(metrics, lambda: records.write_history(metrics, self.recorder.history))
        write_results(
            folder, self.state(), self.schedule, self.recorder, config | (settings or {}), comm
        )

    def close(self) -> None:
        """Detaches from the model and its optimizer. Warns if not all cuts were made.

        Raises:
            RunError: a score of the last step is not finite.
        """
        warn_of_missing_cuts(self.pruner, self.step)
        self._hooks.close()
        self.pruner.detach()
        self.recorder.close()
        self.pruner.check()

    def _export(self, folder: Path | None, tokenizer: Any, *, merge: bool) -> None:
        # importing the callback loads no writer
        from loraprune_ds.session.live_export import export_live

        export_live(self.pruner, self.state(), self.dtype, folder, tokenizer, merge=merge)
