"""What a folder holds follows from the files in it. They are empty here: only a run's status is read."""

from pathlib import Path

import pytest

from loraprune_ds.checkpoint.layout import Status, write_status
from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.generate.models import find_model, open_result
from tests.support.refusals import must_name

ADAPTER = "adapter_config.json"
CASES = {
    "any": (["any/config.json"], {"model": "any"}),
    "run/model": (["run/model/config.json"], {"model": "run/model"}),
    "tuned/model": (
        ["tuned/model/config.json", "tuned/report.json"],
        {"model": "tuned/model", "results": "tuned"},
    ),
    "tuned/base": (["tuned/base/config.json", "tuned/report.json"], {"model": "tuned/base"}),
    "lora": ([f"lora/{ADAPTER}"], {"adapter": "lora"}),
    "apart": ([f"apart/adapter/{ADAPTER}", "apart/base/config.json"], {"adapter": "apart/adapter"}),
    "out": (
        ["out/report.json", f"out/{ADAPTER}"],
        {"model": "out/model", "adapter": "out", "results": "out"},
    ),
    "step-2": (["step-2/state.json"], {"checkpoints": ["step-2"]}),
    "checkpoint-2": (
        ["checkpoint-2/pruning/state.json", f"checkpoint-2/{ADAPTER}"],
        {"checkpoints": ["pruning"]},
    ),
    "callback": (
        ["callback/checkpoint-2/pruning/state.json", f"callback/checkpoint-4/{ADAPTER}"],
        {"checkpoints": ["pruning"]},
    ),
    "other": (["other/text.txt"], {}),
    "absent": ([], {}),
}


def make_files(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def parts_of(folder: Path) -> dict[str, object]:
    """Describes what the folder holds, without what it does not hold."""
    contents = find_contents(folder)
    parts: dict[str, object] = {}
    for name in ("model", "adapter", "results"):
        path = getattr(contents, name)
        if path is not None:
            parts[name] = str(path)
    if contents.checkpoints:
        parts["checkpoints"] = [path.name for path in contents.checkpoints]
    return parts


@pytest.mark.parametrize("folder", CASES)
def test_files_say_what_a_folder_holds(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files, expected = CASES[folder]
    make_files(tmp_path, files)
    results = expected.get("results")
    if folder.endswith("/model") and results:
        expected = expected | {"results": str(tmp_path / str(results))}
    assert parts_of(Path(folder)) == expected


@pytest.mark.parametrize(
    ("status", "checkpoints", "model"),
    [
        (Status("stopped", 10, 20), ["step-10", "step-2"], False),
        (Status("finished", 10, 10), ["step-10"], True),
        (Status("finished", 12, 12), [], True),
    ],
)
def test_a_finished_run_has_only_the_checkpoint_of_its_model(
    status: Status, checkpoints: list[str], model: bool, tmp_path: Path
) -> None:
    make_files(tmp_path, [f"checkpoints/step-{step}/state.json" for step in (2, 10)])
    write_status(tmp_path, status)
    parts = parts_of(tmp_path)
    assert parts.get("checkpoints", []) == checkpoints
    assert parts.get("model") == (str(tmp_path / "model") if model else None)


@pytest.mark.parametrize("folder", ["step-2", "other", "absent", "stopped", "lora"])
def test_what_a_command_cannot_read_is_named(folder: str, tmp_path: Path) -> None:
    here = tmp_path / folder
    make_files(tmp_path, CASES.get(folder, (["stopped/text.txt"],))[0])
    if folder == "stopped":
        write_status(here, Status("stopped", 3, 8))
    names = f"{here} 3 8" if folder == "stopped" else str(here)
    must_name(names, open_result, here)
    if folder != "lora":
        must_name(names, find_model, str(here))
    if folder != "step-2":
        must_name(names, export, find_contents(here), "hf", tmp_path / "exported")
