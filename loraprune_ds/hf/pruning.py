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
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import nn

from loraprune_ds.checkpoint.load import keep_to_lists
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.engine.live import LiveTraining
from loraprune_ds.engines import connect
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import read_json, remove_folder, remove_leftovers, staging_of, write_json
from loraprune_ds.hf.checkpoint import PruningCheckpoint, PruningState, group_counts, write_pruning
from loraprune_ds.hf.checks import check_model
from loraprune_ds.hf.compiled import check_accelerate, check_not_compiled
from loraprune_ds.hf.forward_watch import ForwardWatch
from loraprune_ds.hf.layers import LiveModel
from loraprune_ds.hf.live import base_config, base_dtype, find_peft_model, live_shape, model_name
from loraprune_ds.hf.quantised import adopt_quantised
from loraprune_ds.model.groups import QUERY_HEADS
from loraprune_ds.pretrained.adapters import ADAPTER_FILE
from loraprune_ds.pretrained.exported_config import export_config
from loraprune_ds.pretrained.weight_files import drop_auto_maps
from loraprune_ds.pruning.schedule import plan_pruning
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.pruning.steps import PruningSteps, RankNumbers
from loraprune_ds.pruning.target import resolve
from loraprune_ds.ranks.device import device_name, peak_bytes
from loraprune_ds.report import records

log = logging.getLogger(__name__)


class Pruning:
    """Scores and cuts a model that an external loop trains, and exports it: on ZeRO-3, on DDP or in one process.

    Args:
        model: DeepSpeed's engine, DistributedDataParallel, or the PEFT model inside, ready to train.
        optimizer: torch's, or returned by `accelerator.prepare` or `deepspeed.initialize`. A loss scaler of your own
            must be its attribute `scaler`, as in accelerate.
        steps: optimizer steps of the whole training. The schedule is a fraction of them.
        checkpoint: returned by `cut_to_checkpoint`.
        ds_config: DeepSpeed's JSON, if `model` is not the engine.

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
        ds_config: dict[str, Any] | None = None,
        sinks: Sequence[records.Sink] = (),
    ) -> None:
        """Checks the model and attaches to it. Collective."""
        saved = checkpoint and checkpoint.state
        if saved:  # with others the training would make other cuts
            require(
                saved.steps == steps,
                f"the checkpoint's schedule has {saved.steps} steps, not {steps}",
            )
            require(saved.seed == seed, f"the checkpoint's seed is {saved.seed}, not {seed}")
        check_accelerate()
        self.peft_model = peft_model = find_peft_model(model)
        adopt_quantised(peft_model, refits=config.compensate != "none")
        check_model(peft_model)
        self.model = connect(
            LiveTraining(model, peft_model, live_shape(peft_model), optimizer, ds_config)
        )
        if checkpoint and checkpoint.restores_optimizer:
            checkpoint.restore_lora(self.model)
        dense = checkpoint.dense if checkpoint else self.model.shape
        self.pruner = Pruner(self.model, plan_pruning(*resolve(config, dense), steps), seed)
        self.dtype: Dtype = base_dtype(peft_model, dense)  # of the frozen weights
        self.steps, self.seed = steps, seed
        self.step = saved.step if saved else 0  # the last completed step
        self.resumed_from = [*saved.resumed_from, self.step] if saved else []
        history, is_first = (
            checkpoint.restore(self.pruner) if checkpoint else records.History(),
            self.model.rank == 0,
        )
        self.recorder = records.Recorder(history, sinks if is_first else ())
        self._scorer = PruningSteps(
            self.model, self.pruner, "float16" if self.model.skips_updates else self.dtype
        )
        self._forward = ForwardWatch(self.pruner)
        self._recording = ExitStack()
        self._began = 0.0
        # learning rate and rank numbers of the open step
        self._update: tuple[float, RankNumbers] | None = None
        self._detach = self.model.before_each_update(
            self._score, reads_gradients=config.criterion == "lora"
        )

    @property
    def cuts(self) -> list[records.CutRecord]:
        return self.recorder.history.cuts

    @property
    def reached(self) -> float:
        """The removed fraction of the dense decoder-layer linear parameters."""
        return self.pruner.reached()

    def begin_step(self) -> None:
        """Begins an optimizer step, before its first forward pass. Raises UserError inside a step."""
        step = self.step + 1
        require(
            not self._forward.active,
            f"begin_step was called twice in step {step}, without end_step between",
        )
        check_not_compiled(self.peft_model)  # it may be by now
        self._forward.active, self._update, self._began = True, None, time.perf_counter()
        self._recording.enter_context(self.pruner.record_step(step))

    def end_step(self, loss: float = math.nan) -> records.CutRecord | None:
        """Ends an optimizer step after its update, and cuts the model if a cut is due.

        Raises:
            UserError: the optimizer made no update since `begin_step`.
            RunError: see `Pruner.cut`.
        """
        step, seconds = self.step + 1, time.perf_counter() - self._began
        if self._update is None and self.model.skips_updates:  # a gradient overflowed
            self._update, self._scorer.scored = self._exchange(), False
        if self._update is None:
            raise UserError(
                f"end_step was called in step {step}, but the optimizer has made no update"
            )
        learning_rate, numbers = self._update
        tokens, skipped = int(sum(numbers.own)), not self._scorer.scored
        self._recording.close()
        self._forward.active, self._update = False, None
        self.step = step
        record = records.StepRecord(
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            grad_norm=None if skipped else self.model.gradient_norm(),
            sparsity=self.reached,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            weight_bytes=self._scorer.weight_bytes,
            resident_bytes=numbers.resident_bytes,
            skipped=skipped,
        )
        self.recorder.write(record)
        if (cut := self._scorer.cut(step)) is None:
            return None
        cut_record = records.record_cut(cut, self._scorer)
        self.recorder.write(cut_record)
        return cut_record

    def save(self, folder: str | Path) -> None:
        """Completes a trainer's checkpoint for `cut_to_checkpoint`. Collective. RunError if a rank cannot write."""
        folder, model, pruner = Path(folder), self.model, self.pruner
        if model.rank == 0:
            remove_leftovers(folder)
        dense = pruner.limits.dense
        state = PruningState(
            step=self.step,
            steps=self.steps,
            world_size=model.world_size,
            zero=model.engine == "zero3",
            query_heads=QUERY_HEADS in dense.kinds,
            seed=self.seed,
            prune=pruner.config,
            dense=group_counts(dense),
            kept=keep_to_lists(pruner.kept_of_dense, dense.kinds),
            updates_since_cut=pruner.average.updates_since_cut,
            moment_tokens=pruner.moment_tokens,
            resumed_from=self.resumed_from,
        )
        write_pruning(folder, state, pruner, self.recorder.history)

    def save_model(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes the pruned model with LoRA merged. Collective. Raises UserError if the folder is not empty."""
        self._export(Path(folder), tokenizer, merge=True)

    def save_size(self, folder: str | Path, tokenizer: Any = None) -> None:
        """Writes the model of one of `prune.sizes` into `folder`, if one has ended, over an earlier one. Collective."""
        sizes = self.pruner.schedule.ends()
        if self.step not in sizes:
            return
        target = Path(folder) / records.export_folder(sizes, self.step)
        self.model.comm.write_on_rank_0(
            target, lambda: remove_folder(target) if target.exists() else None
        )
        self.save_model(target, tokenizer)

    def save_base(
        self, folder: str | Path, adapter: str | Path | None = None, tokenizer: Any = None
    ) -> None:
        """Writes the pruned base without LoRA, and makes the adapter on disk name it as its base. Collective.

        The live adapter cannot name it: at each save PEFT reads the base's config with the class of the dense model,
        which refuses layers of different sizes.

        Raises:
            UserError: the folder exists and is not empty, or the adapter's folder has no adapter.
        """
        comm, path = self.model.comm, None if adapter is None else Path(adapter) / ADAPTER_FILE
        described = None if path is None else comm.on_rank_0(lambda: read_json(path))
        self._export(Path(folder), tokenizer, merge=False)
        if path is not None:
            named = {**(described or {}), "base_model_name_or_path": str(folder)}
            comm.write_on_rank_0(path, lambda: write_json(path, named))

    def write_results(self, folder: str | Path, settings: dict[str, Any] | None = None) -> None:
        """Writes report, kept groups, metrics and pictures. `settings` also go into the report. Collective."""
        # importing the callback must not load matplotlib
        from loraprune_ds.report.report import Outcome, write_results

        folder, pruner = Path(folder), self.pruner
        model = {"path": model_name(self.peft_model), "dtype": self.dtype}
        config = {
            "seed": self.seed,
            "steps": self.steps,
            "model": model,
            "prune": asdict(pruner.config),
        }
        comm, history = self.model.comm, self.recorder.history
        outcome = Outcome(
            config=config | (settings or {}),
            history=history,
            schedule=pruner.schedule,
            pruned=self.model.shape,
            kept_of_dense=pruner.kept_of_dense,
            resumed_from=self.resumed_from,
            accelerator=device_name(),
            peak_bytes=comm.gather_objects(peak_bytes()),
        )

        def write() -> None:
            records.write_history(folder / records.METRICS_FILE, history)
            self.recorder.show_pictures(write_results(folder, outcome))

        comm.write_on_rank_0(folder, write)

    def close(self) -> None:
        """Detaches from the model and its optimizer. Warns if not all cuts were made."""
        end = self.pruner.schedule.last_cut
        if self.step < end and self.model.rank == 0:
            removed = f"{100 * self.reached:.1f} % of {100 * self.pruner.schedule.ratio:.1f} % are removed"
            log.warning(
                "training stopped at step %d, before the last cut at step %d: %s",
                self.step,
                end,
                removed,
            )
        self._detach()
        self._forward.close()
        self.pruner.detach()
        self.recorder.close()

    def _score(self) -> None:
        """Scores the averaged gradients, unless they overflowed in fp16 on some rank. Collective."""
        step = self.step + 1
        require(
            self._forward.active, f"step {step}: the optimizer made an update without a begin_step"
        )
        require(
            self._update is None,
            f"step {step}: the optimizer made two updates between begin_step and end_step",
        )
        _, numbers = self._update = self._exchange()
        unseen = f"step {step}: no forward pass was in training mode, so none was recorded; call model.train() before"
        require(any(numbers.own), unseen)
        self._scorer.score(step, numbers)

    def _exchange(self) -> tuple[float, RankNumbers]:
        """Returns the learning rate, and how the step went on each rank. Collective."""
        learning_rate = float(cast(Any, self.model.optimizer).param_groups[0]["lr"])
        return learning_rate, self._scorer.exchange(self._forward.take_tokens())

    def _export(self, folder: Path, tokenizer: Any, *, merge: bool) -> None:
        """Writes a Hugging Face model. Collective."""
        # Importing the callback loads no writer.
        from loraprune_ds.export.huggingface import begin, publish, write_model
        from loraprune_ds.export.model_card import ModelCard

        comm, source, pruned = self.model.comm, base_config(self.peft_model), self.model.shape
        card = ModelCard(
            base_model=model_name(self.peft_model),
            dense=self.pruner.limits.dense,
            pruned=pruned,
            prune=self.pruner.config,
            asked=self.pruner.schedule.section(self.step).ratio,
            data="data of its own trainer",
            steps=self.step,
            perplexity_data="not measured",
        )
        comm.write_on_rank_0(folder, lambda: begin(folder))
        with tempfile.TemporaryDirectory() as path:
            dense = Path(path)  # has the files of the dense model next to its weights
            comm.write_on_rank_0(dense, lambda: self._save_settings(dense, source, tokenizer))
            live = LiveModel(
                self.model, export_config(source, pruned, self.dtype), dense, self.dtype
            )
            write_model(live, staging_of(folder), card, comm, merge=merge)
        comm.write_on_rank_0(folder, lambda: publish(folder))

    def _save_settings(self, dense: Path, config: dict[str, Any], tokenizer: Any) -> None:
        base: Any = self.peft_model.get_base_model()
        write_json(dense / "config.json", config)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(dense)
        if tokenizer is not None:
            tokenizer.save_pretrained(dense)
            # the trainer's user may trust a tokenizer's code; an export brings none
            drop_auto_maps(dense)
