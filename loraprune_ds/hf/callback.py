"""Prunes in transformers' Trainer and in TRL's trainers, by one callback:

trainer = SFTTrainer(..., callbacks=[LoraPruneCallback(PruneConfig(ratio=0.3))])
"""

import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import rotate_checkpoints

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.config import PruneConfig
from loraprune_ds.engine.ds_config import check_reshardable
from loraprune_ds.errors import UserError, require
from loraprune_ds.files import JsonObject, is_ours, remove_folder
from loraprune_ds.hf import trainer_files
from loraprune_ds.hf.arguments import check_arguments
from loraprune_ds.hf.load_guard import LoadGuard
from loraprune_ds.hf.table import describe
from loraprune_ds.pretrained.weight_files import check_room
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report.records import CutRecord, Record, Sink, cut_line
from loraprune_ds.report.reporters import SERVICES, ModuleLog, TensorBoardLog, scalars
from loraprune_ds.session.checkpoint import PruningCheckpoint, cut_to_checkpoint
from loraprune_ds.session.checks import check_one_dtype
from loraprune_ds.session.live import find_peft_model
from loraprune_ds.session.pruning import Pruning
from loraprune_ds.session.quantised import prepare_quantised
from loraprune_ds.versions import can_show, check_new

log = logging.getLogger(__name__)
REPORTED = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "max_grad_norm",
)
LIMIT = "_save_total_limit"  # key in the Trainer's arguments for the user's value during a training
TRAINERS_OWN = ("train/loss", "train/learning_rate", "train/grad_norm")  # the Trainer logs these
RESUME = "call trainer.train(resume_from_checkpoint=pruning.resume(trainer.model))"


class LoraPruneCallback(TrainerCallback):
    """Scores and cuts the model of one Trainer while it trains.

    At the end `output_dir` has report.json, kept_groups.json, metrics.jsonl and their pictures. Each checkpoint has a
    folder `pruning/`.

    Args:
        steps: the optimizer steps of the schedule. Default: all steps of the Trainer.
        seed: for the criterion `random`.
    """

    def __init__(self, config: PruneConfig, steps: int | None = None, seed: int = 0) -> None:
        if is_deepspeed_zero3_enabled():  # its arguments were made, but maybe not its model
            check_new("deepspeed")
        self.config = config
        self.steps = steps
        self.seed = seed
        self._pruning: Pruning | None = None
        self._checkpoint: PruningCheckpoint | None = None
        self._tokenizer: Any = None
        self._output_dir = "."
        self._guard = ExitStack()  # until the training begins
        # of a checkpoint, for the Trainer
        self._stand_in: tempfile.TemporaryDirectory[str] | None = None

    @property
    def pruning(self) -> Pruning:
        """The pruning of this training. Raises UserError before training has begun."""
        if self._pruning is None:
            raise UserError("LoraPruneCallback: training has not begun")
        return self._pruning

    @property
    def cuts(self) -> list[CutRecord]:
        return self.pruning.cuts

    @property
    def reached(self) -> float:
        """The removed fraction of the dense decoder-layer linear parameters."""
        return self.pruning.reached

    def resume(self, model: Any, folder: str | Path | None = None) -> str | None:
        """Cuts the dense model to a checkpoint. Call it before `trainer.train(resume_from_checkpoint=...)`. Collective.

        Settings with their default value come from the checkpoint.

        Args:
            model: `trainer.model`, dense and with LoRA.
            folder: a checkpoint, or a folder of checkpoints. Default: the `output_dir`.

        Returns:
            What stands in for the newest complete checkpoint, for `resume_from_checkpoint`. None before the first one.

        Raises:
            UserError: the checkpoint is damaged or incomplete, belongs to another model or config, or has no loss scale
                for DeepSpeed.
        """
        comm = Communicator()
        folder = Path(folder or self._output_dir)
        checkpoint = cut_to_checkpoint(model, folder, self.config, comm)
        self._checkpoint = checkpoint
        if checkpoint is None:
            comm.all_or_raise(lambda: trainer_files.check_none(folder))
            return None
        self._guard.close()
        self.config = checkpoint.prune
        peft_model = find_peft_model(model)
        comm.all_or_raise(lambda: trainer_files.check_complete(checkpoint, peft_model))
        lost = trainer_files.lost(checkpoint.of_trainer, comm.world_size)
        if lost and comm.rank == 0:
            log.warning("%s is missing, so dropout goes on with other random numbers", lost)
        self._stand_in = tempfile.TemporaryDirectory()
        trainer_files.write_stand_in(checkpoint, peft_model, Path(self._stand_in.name), comm)
        return self._stand_in.name

    def save_model(self, folder: str | Path) -> None:
        """Writes the pruned model with LoRA merged. Collective. Raises UserError if the folder is not empty."""
        self.pruning.save_model(folder, self._tokenizer)

    def save_base(self, folder: str | Path, adapter: str | Path | None = None) -> None:
        """Writes the pruned base without LoRA. Collective.

        Args:
            adapter: folder written by `trainer.save_model`. Its adapter then names this base.
        """
        self.pruning.save_base(folder, adapter, self._tokenizer)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Refuses what a library would fail on without a reason, such as a checkpoint loaded without `resume`."""
        self._output_dir = str(args.output_dir)
        ds_config = _ds_config(args)
        if ds_config is not None:
            check_new("deepspeed")
            # some settings fail at DeepSpeed's start
            check_reshardable("the DeepSpeed config", ds_config)
        model = more.get("model")
        if isinstance(model, nn.Module):
            prepare_quantised(model, sharded=ds_config is not None)
            check_one_dtype(model)
            check_arguments(args, model)  # before TRL starts an engine for generation
            self._guard.callback(LoadGuard(model, RESUME).remove)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Checks the training, then attaches to the model and its optimizer."""
        require(
            self._pruning is None,
            "LoraPruneCallback serves one training; make a new one for the next",
        )
        model = cast(nn.Module, more["model"])
        checkpoint = self._checkpoint
        check_arguments(args, model)
        self._guard.close()
        resumed_from = checkpoint.state.step if checkpoint else None
        require(
            state.global_step == (resumed_from or 0),
            f"training resumes at step {state.global_step}, but pruning does not: {RESUME}",
        )
        self._tokenizer = more.get("processing_class")
        sinks = list[Sink]()
        if state.is_world_process_zero:
            sinks = find_reporters(args.report_to or (), str(args.output_dir), resumed_from)
        self._pruning = Pruning(
            model,
            more["optimizer"],
            self.config,
            self.steps or state.max_steps,
            seed=self.seed,
            checkpoint=checkpoint,
            ds_config=_ds_config(args),
            sinks=sinks,
            tokenizer=self._tokenizer,
        )
        folder = Path(str(args.output_dir))
        schedule = self._pruning.schedule
        dtype = self._pruning.dtype

        def announce() -> None:
            tqdm.write("\n".join(describe(schedule, dtype, folder)))
            check_room(folder, schedule.final_numel, dtype)

        self._pruning.model.comm.on_rank_0(announce)
        if checkpoint:
            _restore_schedule(more["lr_scheduler"], checkpoint.resume_state().schedule)
        # The Trainer would remove old checkpoints before `on_save` has completed the new one.
        args.__dict__.setdefault(LIMIT, args.save_total_limit)  # a failed training may have left it
        args.save_total_limit = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.pruning.begin_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Makes a due cut. The Trainer logs, evaluates and saves after that."""
        self.pruning.end_step()
        _forget_overwritten(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        _forget_overwritten(args, state, control)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Adds the loss to the records, a mean over the steps since the last log."""
        if self._pruning is None:  # an evaluation before the training
            return
        history = self._pruning.recorder.history
        loss = (more.get("logs") or {}).get("loss", math.nan)
        if history.steps and history.steps[-1].step == state.global_step and math.isfinite(loss):
            history.steps[-1] = replace(history.steps[-1], loss=float(loss))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Completes the Trainer's checkpoint. Then removes the oldest ones beyond `save_total_limit`."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.pruning.save(folder, more["lr_scheduler"].state_dict())
        if args.should_save:
            # otherwise the newest, in case files have no times
            spared = state.best_model_checkpoint or str(folder)
            rotate_checkpoints(str(args.output_dir), args.__dict__[LIMIT], spared, use_mtime=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Writes the results and detaches from the engine. The model can still be saved."""
        args.save_total_limit = args.__dict__.pop(LIMIT)
        train = {name: getattr(args, name) for name in REPORTED}
        self.pruning.write_results(
            str(args.output_dir), {"trainer": type(args).__name__, "train": train}
        )
        self.pruning.close()
        if self._stand_in is not None:
            self._stand_in.cleanup()


def _ds_config(args: TrainingArguments) -> JsonObject | None:
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else plugin.hf_ds_config.config


def _restore_schedule(schedule: Any, saved: JsonObject) -> None:
    """Restores a schedule, but no list of another length: DeepSpeed removes groups without parameters."""
    now = schedule.state_dict()
    require(
        now.keys() & saved.keys(),
        f"the checkpoint has no state of a schedule such as {type(schedule).__name__}; train with the one that it had",
    )
    for key, value in saved.items():
        fits = not isinstance(value, list) or len(value) == len(now[key])
        if fits and value is not None:  # JSON has no infinity, which a new schedule has, too
            now[key] = value
    schedule.load_state_dict(now)


def _forget_overwritten(
    args: TrainingArguments, state: TrainerState, control: TrainerControl
) -> None:
    """Makes a checkpoint of an earlier training incomplete if the Trainer may overwrite it."""
    old = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / PRUNING_FOLDER
    # the Trainer decides after its evaluation
    may_save = control.should_save or args.save_strategy == "best"
    if may_save and args.should_save and is_ours(old):
        remove_folder(old)


def find_reporters(
    report_to: Iterable[str], output_dir: str, resumed_from: int | None
) -> list[Sink]:
    """Makes the sinks for a Trainer's `report_to`, and one that prints a line for each cut.

    A callback cannot add to the Trainer's own log lines, because the reporters have already read them.
    """
    sinks: list[Sink] = [CutPrinter()]
    if "tensorboard" in report_to and can_show("tensorboard"):
        root = os.environ.get("TENSORBOARD_LOGGING_DIR") or os.path.join(output_dir, "runs")
        sinks.append(TensorBoardLog(Path(root).expanduser() / "pruning", resumed_from, curves))
    return sinks + [ModuleLog(name, _warn, curves) for name in SERVICES if name in report_to]


def _warn(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


def curves(record: Record) -> dict[str, float]:
    values = dict[str, float]()
    for tag, value in scalars(record).items():
        if tag not in TRAINERS_OWN:
            values[f"pruning/{tag.removeprefix('train/')}"] = value
    return values


class CutPrinter(Sink):
    """Prints a line for each cut, above a Trainer's progress bar."""

    def write(self, record: Record) -> None:
        if isinstance(record, CutRecord):
            _warn(cut_line(record))
