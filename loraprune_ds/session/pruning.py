"""Prunes a model while an external loop trains it, by two calls around each optimizer step:

    pruning = Pruning(model, optimizer, PruneConfig(ratio=0.3), steps=100)
    for batch in batches:
        pruning.begin_step()
        ...                     forward and backward passes, the optimizer's update
        pruning.end_step()

Scores are computed right before the update, from averaged gradients before clipping.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.config import PruneConfig
from loraprune_ds.engine.live import LiveTraining
from loraprune_ds.engines import connect
from loraprune_ds.errors import require
from loraprune_ds.files import JsonObject, read_json, remove_leftovers, write_json
from loraprune_ds.pretrained.adapters import ADAPTER_FILE
from loraprune_ds.pruning.schedule import plan_pruning
from loraprune_ds.pruning.target import resolve
from loraprune_ds.report import records
from loraprune_ds.session.checkpoint import PruningCheckpoint
from loraprune_ds.session.checks import check_model
from loraprune_ds.session.compiled import check_accelerate, check_not_compiled
from loraprune_ds.session.forward_watch import ForwardWatch
from loraprune_ds.session.live import base_dtype, base_name, find_peft_model, live_shape
from loraprune_ds.session.origin import describe_origin, describe_settings
from loraprune_ds.session.quantised import adopt_quantised
from loraprune_ds.session.session import PruningSession

log = logging.getLogger(__name__)


class Pruning(PruningSession):
    """Scores and cuts a model that an external loop trains, and exports it: in one process, on DDP, ZeRO-3 or FSDP2.

    Hooks record the passes, and score before each update.

    Args:
        model: DeepSpeed's engine, DistributedDataParallel, or the PEFT model inside, sharded or not, ready to train.
        optimizer: torch's, or returned by `accelerator.prepare` or `deepspeed.initialize`.
        steps: optimizer steps of the whole training. The schedule is a fraction of them.
        checkpoint: returned by `cut_to_checkpoint`.
        ds_config: DeepSpeed's JSON, if `model` is not the engine.
        tokenizer: for the models that will be saved. Whether it can be is tried now.
        scaler: your own `torch.amp.GradScaler`. That of accelerate is known.

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
        if checkpoint:
            checkpoint.check_schedule(steps, seed)
        check_accelerate()
        peft_model = find_peft_model(model)
        adopt_quantised(peft_model, refits=config.compensate != "none")
        check_model(peft_model)
        self.peft_model = peft_model
        scaler = scaler or getattr(optimizer, "scaler", None)
        shape = live_shape(peft_model)
        live = connect(LiveTraining(model, peft_model, shape, optimizer, ds_config, scaler))
        if checkpoint and checkpoint.restores_optimizer:
            checkpoint.restore_lora(live)
        dense = checkpoint.dense if checkpoint else live.shape
        schedule = plan_pruning(*resolve(config, dense), steps)
        dtype = base_dtype(peft_model, dense)
        if checkpoint:
            origin = checkpoint.state.origin
            settings = describe_settings(live, schedule, dtype) | origin.config
            origin = replace(origin, config=settings)
        else:
            origin = describe_origin(live, schedule, dtype, steps=steps, seed=seed)
        history = checkpoint.history() if checkpoint else records.History()
        recorder = records.Recorder(history, sinks if live.rank == 0 else ())
        super().__init__(live, schedule, dtype, origin=origin, recorder=recorder)
        if checkpoint:
            self.restore(checkpoint)
        self._export(None, tokenizer, merge=True)
        self._forward = ForwardWatch(self.pruner)
        self._hooks = ExitStack()
        self._hooks.callback(
            live.before_each_update(self._before_update, reads_gradients=config.criterion == "lora")
        )

    def begin_step(self) -> None:
        """Begins an optimizer step, before its first forward pass. Raises UserError inside a step."""
        require(
            not self._forward.active,
            f"begin_step was called twice in step {self.step + 1}, without end_step between",
        )
        check_not_compiled(self.peft_model)  # it may be by now
        self._forward.active = True
        super().begin_step()

    def end_step(
        self, loss: float = math.nan, *, tokens: int | None = None, flops: float | None = None
    ) -> records.CutRecord | None:
        """Ends an optimizer step after its update, and cuts the model if a cut is due.

        Raises:
            UserError: the optimizer made no update since `begin_step`.
            RunError: see `Pruner.cut`.
        """
        if not self.exchanged:
            self._expect_skip()
        self._forward.active = False
        return super().end_step(loss, tokens=tokens, flops=flops)

    def save(self, folder: str | Path) -> None:
        """Completes a trainer's checkpoint for `cut_to_checkpoint`. Collective. RunError if a rank cannot write."""
        folder = Path(folder)
        if self.model.rank == 0:
            remove_leftovers(folder)
        self.save_step(folder / PRUNING_FOLDER, "pruning", with_records=True)

    def save_model(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes the pruned model with LoRA merged. Collective. Raises UserError if the folder is not empty."""
        self._export(Path(folder), tokenizer, merge=True)

    def save_base(
        self, folder: str | Path, adapter: str | Path | None = None, tokenizer: Any = None
    ) -> None:
        """Writes the pruned base without LoRA, and makes the adapter on disk name it as its base. Collective.

        The live adapter cannot name it: at each save PEFT reads the base's config with the class of the dense model,
        which refuses layers of different sizes.

        Raises:
            UserError: the folder exists and is not empty, or the adapter's folder has no adapter.
        """
        if adapter is None:
            self._export(Path(folder), tokenizer, merge=False)
            return
        comm = self.model.comm
        path = Path(adapter) / ADAPTER_FILE
        config = comm.on_rank_0(lambda: read_json(path)) or {}
        self._export(Path(folder), tokenizer, merge=False)
        config["base_model_name_or_path"] = str(folder)
        comm.write_on_rank_0(path, lambda: write_json(path, config))

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
        end = self.schedule.last_cut
        if self.step < end and self.model.rank == 0:
            log.warning(
                "training stopped at step %d, before the last cut at step %d: %.1f %% of %.1f %% are removed",
                self.step,
                end,
                100 * self.reached,
                100 * self.schedule.ratio,
            )
        self._hooks.close()
        self._forward.close()
        self.pruner.detach()
        self.recorder.close()
        self.pruner.check()

    def _expect_skip(self) -> None:
        """Ends a step without an update. Only a loss scaler may leave it out, as it saw an overflow. Collective."""
        is_skipped = False
        if self.model.skips_updates:
            numbers = self.exchange(tokens=self._forward.take_tokens())
            is_skipped = not all(map(math.isfinite, numbers.gradient_norms))
        require(
            is_skipped,
            f"end_step was called in step {self.step + 1}, but the optimizer has made no update",
        )
        self.scored = False

    def _before_update(self) -> None:
        """Scores the averaged gradients, unless they overflowed in fp16 on some rank. Collective."""
        step = self.step + 1
        require(
            self._forward.active, f"step {step}: the optimizer made an update without a begin_step"
        )
        require(
            not self.exchanged,
            f"step {step}: the optimizer made two updates between begin_step and end_step",
        )
        numbers = self.exchange(tokens=self._forward.take_tokens())
        require(
            any(numbers.tokens),
            f"step {step}: no forward pass was in training mode, so none was recorded; "
            "call model.train() before",
        )
        self._forward.check_calls()
        self.score()

    def _export(self, folder: Path | None, tokenizer: Any, *, merge: bool) -> None:
        # importing the callback loads no writer
        from loraprune_ds.session.live_export import export_live

        export_live(self, self.peft_model, folder, tokenizer, merge=merge)
