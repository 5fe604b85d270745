"""Writes the results of a foreign training as a run of ours has them: report, kept groups, metrics, pictures."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.run_folder import KEPT_GROUPS_PICTURE, METRICS_FILE, TRAINING_PICTURE
from loraprune_ds.hf.live import model_name
from loraprune_ds.hf.training import PrunedTraining
from loraprune_ds.pruning.target import describe_target
from loraprune_ds.report.metrics import write_history
from loraprune_ds.report.pictures import draw_kept_groups, draw_training
from loraprune_ds.report.report import Outcome, make_report, write_kept_groups, write_report
from loraprune_ds.zero.device import device_name
from loraprune_ds.zero.memory import peak_bytes


def write_results(training: PrunedTraining, folder: Path, settings: dict[str, Any]) -> list[Path]:
    """Writes all results into `folder`. Collective.

    Returns:
        The pictures.

    Args:
        settings: more entries of the report's `config`.
    """
    peaks = training.model.comm.gather_objects(peak_bytes())
    training.model.comm.on_rank_0(lambda: _write(training, folder, settings, peaks))
    return [folder / KEPT_GROUPS_PICTURE, folder / TRAINING_PICTURE]


def _write(training: PrunedTraining, folder: Path, settings: dict[str, Any], peaks: list[int]) -> None:
    dense, pruned = training.pruner.limits.dense, training.model.shape
    model = {"path": model_name(training.peft_model), "dtype": training.dtype}
    config = {"seed": training.seed, "steps": training.steps, "model": model, "prune": asdict(training.pruner.config)}
    target = describe_target(training.pruner.config, dense, pruned)
    outcome = Outcome(pruned, training.pruner.kept_of_dense, training.resumed_from, target)
    report = make_report(config | settings, training.history, dense, outcome, peaks, device_name())
    folder.mkdir(parents=True, exist_ok=True)
    write_kept_groups(folder, outcome.kept_of_dense, dense)
    write_history(folder / METRICS_FILE, training.history)
    write_report(folder, report)
    draw_kept_groups(folder / KEPT_GROUPS_PICTURE, dense, outcome.kept_of_dense)
    draw_training(folder / TRAINING_PICTURE, training.history)
