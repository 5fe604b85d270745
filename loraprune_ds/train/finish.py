"""The results of a run on disk, written by rank 0."""

import shutil
from pathlib import Path

from loraprune_ds.checkpoint.run_folder import KEPT_GROUPS_PICTURE, MODEL_FOLDER, TRAINING_PICTURE
from loraprune_ds.config import RunConfig
from loraprune_ds.export.huggingface import begin, finish_folder, publish
from loraprune_ds.export.model_card import ModelCard, card_of_run, write_model_card
from loraprune_ds.faults import fail_point
from loraprune_ds.model.exported_config import export_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.train.pictures import draw_kept_groups, draw_training
from loraprune_ds.train.prepare import Prepared
from loraprune_ds.train.records import History
from loraprune_ds.train.report import Outcome, make_report, write_kept_groups, write_report
from loraprune_ds.zero.device import device_name


def model_card(config: RunConfig, prepared: Prepared, pruned: ModelShape, history: History) -> ModelCard:
    """The facts of the checkpoint's README, with the perplexities known so far."""
    return card_of_run(
        config,
        prepared.pretrained.shape,
        pruned,
        steps=prepared.steps,
        windows=len(prepared.windows),
        perplexity_dense=history.perplexity("dense"),
        perplexity_pruned=history.perplexity("pruned"),
    )


def start_model(folder: Path) -> Path:
    """The staging folder of `model/`; a model already there is of a run that was killed before its report."""
    if (folder / MODEL_FOLDER).exists():
        shutil.rmtree(folder / MODEL_FOLDER)
    return begin(folder / MODEL_FOLDER)


def describe_model(folder: Path, config: RunConfig, prepared: Prepared, card: ModelCard) -> None:
    """Everything of the checkpoint but its weights."""
    source = prepared.pretrained
    finish_folder(folder, export_config(source.config, card.pruned, config.model.dtype), source.folder, card)


def publish_model(
    staging: Path, folder: Path, config: RunConfig, prepared: Prepared, outcome: Outcome, history: History
) -> None:
    """The final model card, `model/` under its name, the report, the kept groups and the pictures."""
    dense = prepared.pretrained.shape
    exported = export_config(prepared.pretrained.config, outcome.pruned, config.model.dtype)
    write_model_card(staging, model_card(config, prepared, outcome.pruned, history), exported)
    fail_point("finish.before_rename")
    publish(folder / MODEL_FOLDER)
    fail_point("finish.after_rename")
    write_kept_groups(folder, outcome.kept_of_dense, dense)
    write_report(folder, make_report(config, history, dense, outcome, device_name()))
    fail_point("finish.reported")
    draw_kept_groups(folder / KEPT_GROUPS_PICTURE, dense, outcome.pruned)
    draw_training(folder / TRAINING_PICTURE, history)
