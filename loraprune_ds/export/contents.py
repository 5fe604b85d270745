"""Tells what a folder holds that a user names: a run, a checkpoint, a model or an adapter.

Exports, evaluations and `open_result` begin here, so this is the place for another kind of folder.
"""

from dataclasses import dataclass, field
from pathlib import Path

from loraprune_ds.checkpoint import layout
from loraprune_ds.errors import UserError
from loraprune_ds.files import STATE_FILE, JsonObject, read_json
from loraprune_ds.pretrained.adapters import ADAPTER_FILE, ADAPTER_FOLDER
from loraprune_ds.report.records import MODEL_FOLDER, REPORT_FILE


@dataclass(frozen=True)
class FolderContents:
    """What commands can read in a folder. It has read only the status of a run.

    Attributes:
        summary: for messages, such as "is a checkpoint".
        model: folder of the whole model. An unfinished run has none.
        checkpoints: the newest first. If there is a model, they have its weights.
        adapter: folder of the LoRA.
        results: folder of the report of a run, or of a callback's training.
    """

    folder: Path
    summary: str
    model: Path | None = None
    checkpoints: list[Path] = field(default_factory=list)
    adapter: Path | None = None
    results: Path | None = None

    def model_folder(self) -> Path:
        """Returns the folder of the model. Raises UserError if there is none."""
        if self.model is None:
            advice = ""
            if self.checkpoints:
                advice = "; make one with launch/export.py --format hf"
            raise UserError(f"{self.folder} has no model: it {self.summary}{advice}")
        return self.model

    def read_report(self) -> JsonObject | None:
        """Reads the report, if there is one."""
        return read_json(self.results / REPORT_FILE) if self.results else None


def find_contents(folder: Path) -> FolderContents:
    """Tells what a folder holds. Raises UserError if it is a run whose status is damaged."""
    status = layout.read_status(folder)
    if status is not None:
        return _run_contents(folder, status)
    for step in (folder, folder / layout.PRUNING_FOLDER):
        if (step / STATE_FILE).is_file():
            return FolderContents(folder, "is a checkpoint", checkpoints=[step])
    is_model = (folder / "config.json").is_file()
    path = folder.absolute()
    run = path.parent if is_model and path.name == MODEL_FOLDER else folder
    results = run if (run / REPORT_FILE).is_file() else None
    if is_model:
        return FolderContents(folder, "is a model", model=folder, results=results)
    model = folder / MODEL_FOLDER if results else None
    # the second is made by launch/export.py --format adapter
    for adapter in (folder, folder / ADAPTER_FOLDER):
        if (adapter / ADAPTER_FILE).is_file():
            # a callback's training writes all three into its folder
            return FolderContents(
                folder, "is an adapter", model=model, adapter=adapter, results=results
            )
    summary = "holds neither a config.json nor a run" if folder.is_dir() else "is no folder"
    steps = _steps_of_callback(folder)
    if steps:
        summary = "holds checkpoints of a callback"
    return FolderContents(folder, summary, model=model, checkpoints=steps, results=results)


def _steps_of_callback(folder: Path) -> list[Path]:
    """Returns our folders in the checkpoints of a Trainer, the newest first."""
    numbers = layout.numbered(folder, "checkpoint")[::-1]
    steps = [folder / f"checkpoint-{number}" / layout.PRUNING_FOLDER for number in numbers]
    return [step for step in steps if step.is_dir()]


def _run_contents(folder: Path, status: layout.Status) -> FolderContents:
    root = folder / layout.CHECKPOINTS_FOLDER
    steps = layout.numbered(root, "step")[::-1]
    model = None
    if status.state == "finished":
        model = folder / MODEL_FOLDER
        steps = [step for step in steps[:1] if step == status.step]
    return FolderContents(
        folder,
        f"holds a run ({status})",
        model=model,
        checkpoints=[layout.step_folder(root, step) for step in steps],
        results=folder,
    )
