"""The wheel holds all it needs, and its commands work in a folder that has nothing to do with the checkout."""

import json
import shutil
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

from loraprune_ds.arguments import COMMANDS
from tests.support.bad_input import assert_refused
from tests.support.launching import ROOT, Ended, read_json, run_to_end, write_text

SOURCES = ("pyproject.toml", "loraprune_ds", "launch", "ds_configs")


def build_wheel(folder: Path) -> Path:
    """Builds it from a copy, since a build leaves folders behind. This Python has the build tools."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    run_outside(sys.executable, "-m", "pip", "wheel", *options, str(copy), cwd=folder).check()
    shutil.rmtree(copy)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, environment: Path) -> Path:
    """Makes an environment with the wheel and the other packages of this Python. Returns its folder of programs."""
    run_outside(
        sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=wheel.parent
    ).check()
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run_outside(*pip, "install", "--no-deps", "--no-index", str(wheel), cwd=wheel.parent).check()
    (packages,) = environment.glob("lib/python*/site-packages")
    # A path in a .pth file comes last, and the .pth files in there are not read. This checkout stays unknown.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


def run_outside(*command: str, cwd: Path, timeout: float = 300) -> Ended:
    """Runs a command that finds nothing of this checkout."""
    return run_to_end(command, cwd=cwd, environment={"PYTHONPATH": ""}, timeout=timeout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path) -> Path:
    return install_wheel(wheel, wheel.parent / "environment")


def start(programs: Path, folder: Path, *arguments: str, timeout: float = 120) -> Ended:
    return run_outside(str(programs / "loraprune-ds"), *arguments, cwd=folder, timeout=timeout)


def test_the_wheel_has_every_module_config_and_json(wheel: Path) -> None:
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "loraprune_ds").rglob("*.py")}
    given = {path.relative_to(ROOT).as_posix() for pattern in ("launch/configs/**/*.yaml", "ds_configs/*.json")
             for path in ROOT.glob(pattern)}  # fmt: skip
    files = set(ZipFile(wheel).namelist())
    assert "loraprune_ds/model/modeling_pruned.py" in code
    assert len(given) > 15
    data = (
        "generate/prompts.jsonl",
        "chats/chats.json",
        "evaluate/answers.html",
        "report/pictures.mplstyle",
    )
    data += ("train/data/embedded_chats.jsonl", "evaluate/refused_tasks.json")
    assert {f"loraprune_ds/{name}" for name in data} <= files
    assert {
        f"loraprune_ds/export/{name}.txt" for name in ("model_card", "load_adapter", "load_gguf")
    } <= files
    assert "loraprune_ds/export/gguf_pre_tokenizers.json" in files
    assert code | {f"loraprune_ds/shipped/{name}" for name in given} <= files
    others = {name for name in files if not name.startswith("loraprune_ds")}
    assert others == set()


@pytest.mark.heavy
def test_the_commands_find_their_files(programs: Path, tmp_path: Path) -> None:
    listed = start(programs, tmp_path, "--help")
    assert all(f"\n  {name} " in listed.out for name in COMMANDS), listed.everything
    assert start(programs, tmp_path, "compare", "--help").out.startswith(
        "usage: loraprune-ds compare "
    )
    planned = start(
        programs, tmp_path, "plan", "llama-7b", "--gpus-per-node", "8", "--gpu-memory", "80"
    )
    assert planned.code == 0, planned.everything
    quickstart = ("run", "--ranks", "2", "--config", "launch/configs/quickstart.yaml")
    shown = start(
        programs, tmp_path, *quickstart, "--set", "prune.ratio=0.4", "--show", "prune.ratio"
    )
    assert (shown.code, shown.out) == (0, "0.4\n"), shown.everything
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_is_told_before_ranks_start(programs: Path, tmp_path: Path) -> None:
    assert_refused(start(programs, tmp_path, "prune"), "prune", "evaluate")
    assert_refused(
        start(programs, tmp_path, "run", "--ranks", "0", "--config", "q.yaml"), "--ranks", "0"
    )
    wrong = ("--config", "launch/configs/quickstart.yaml", "--set", "prune.ratio=2")
    assert_refused(start(programs, tmp_path, "run", *wrong), "prune.ratio")


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_quickstart_runs_from_the_wheel(programs: Path, tmp_path: Path) -> None:
    """Makes fewer steps than the quickstart does."""

    def run(*arguments: str) -> str:
        return start(programs, tmp_path, *arguments, timeout=1500).check().out

    run(
        "run",
        "--ranks",
        "2",
        "--config",
        "launch/configs/quickstart.yaml",
        "--set",
        "train.steps=12",
        "--set",
        "evaluate.after=[]",
    )
    report = read_json(tmp_path / "runs/quickstart/report.json")
    assert report["versions"]["commit"] is None  # it came from the wheel
    text = write_text(tmp_path / "text.txt", 20_000)
    measured = json.loads(run("evaluate", "runs/quickstart", "--text", str(text), "--json"))
    assert 1 < measured["perplexity"] < 100
    assert "\nquickstart " in run("compare", "runs/quickstart")
    run("export", "runs/quickstart", "--format", "gguf-q8_0")
    assert list(tmp_path.glob("quickstart-gguf-q8_0/*.gguf"))
