"""A good run, and what makes it unusable."""

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.oracle.models import make_tiny_llama
from tests.support.launching import Ended, write_config, write_text
from tests.support.paper import PAPER
from tests.support.refusals import Spoil

STEPS = 4
# (material, here): prepares in `here` what a wrong config names
Make = Callable[[Path, Path], None]


def make_material(root: Path) -> Path:
    """Makes the inputs of a good run: model/, text.txt and run.yaml, which names no output_dir."""
    make_tiny_llama(root / "model", layers=3, vocab=259, tie=True)
    write_text(root / "text.txt", 6_000)
    content = {
        "model": {"path": str(root / "model"), "dtype": "float32"},
        "data": {"path": str(root / "text.txt"), "window": 32},
        "prune": PAPER | {"channel_multiple": 1, "ratio": 0.2, "prune_every": 1},
        "train": {
            "steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "distill_weight": 0,
        },
        "evaluate": {"window": 32, "max_windows": 4},
    }
    write_config(root / "run.yaml", content)
    return root


def arguments(material: Path, here: Path, *overrides: str) -> list[str]:
    given = [f"output_dir={here / 'out'}", *overrides]
    return [
        "--config",
        str(material / "run.yaml"),
        *(word for override in given for word in ("--set", override)),
    ]


def assert_refused(ended: Ended, *words: str, code: int = 2) -> None:
    """One line, with these words in it."""
    assert ended.code == code, ended.everything
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.everything
    assert lines[0].startswith("error: "), ended.everything
    for word in words:
        assert word in lines[0]


def copy_of_model(change: Spoil) -> Make:
    """A copy of the model at {here}/model, changed."""

    def make(material: Path, here: Path) -> None:
        shutil.copytree(material / "model", here / "model")
        change(here / "model")

    return make


def file_at(name: str, text: str) -> Make:
    def make(material: Path, here: Path) -> None:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(text)

    return make
