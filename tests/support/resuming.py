"""Runs, stops and resumes whole runs inside pool workers, and reads their checkpoints."""

import gc
import itertools
import json
import os
import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.checkpoint.layout import Status, write_status
from loraprune_ds.config import RunConfig
from loraprune_ds.config_file import config_from_dict, read_config
from loraprune_ds.errors import UserError
from loraprune_ds.model.classes import build_on_meta
from loraprune_ds.pretrained import read_shape
from loraprune_ds.pretrained.pretrained import open_for_pruning
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.train import run as run_module
from loraprune_ds.train.checkpoints import RunContext, find_checkpoint
from loraprune_ds.train.output import OutputFolder
from loraprune_ds.train.run import run
from loraprune_ds.train.stop import NOTHING, STOP, RequestListener
from tests.oracle.models import make_tiny_llama
from tests.support import resuming
from tests.support.families import is_seq2seq, tiny_model
from tests.support.paper import FREE, PAPER
from tests.support.refusals import full_disk, refused

STEPS = 20
CUTS = [7, 12, 17]  # nothing is left to go at 18, where the last would be due
# Of 8 steps: cuts after 4, 6 and 8, each with a refit.
REFITS = {
    "prune_every": 2,
    "warmup_fraction": 0.25,
    "cooldown_fraction": 0.0,
    "compensate": "least_squares",
}


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """Writes a tiny model, text and config into `folder`. Adam's epsilon: see test_sharded_equals_dense.py."""
    make_tiny_llama(
        folder / "source", heads=8, kv_heads=4, hidden=64, ffn=93, layers=3, biases=True
    )
    words = random.Random(0)
    names = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
    lines = (" ".join(words.choice(names) for _ in range(12)) for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines))
    config: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "source"), "dtype": "float32"},
        "lora": {"r": 4, "lora_dropout": 0.1},
        "data": {"path": str(folder / "text.txt"), "window": 24},
        "prune": PAPER | FREE | {"ratio": 0.4, "prune_every": 5},
        "train": {"steps": STEPS, "global_batch_size": 6, "micro_batch_size": 1}
        | {"learning_rate": 5e-3, "adam_epsilon": 1e-3, "distill_weight": 0},
        "evaluate": {"window": 24, "max_windows": 4},
        "checkpoint": {"every": 1, "keep_last": STEPS},
        "logging": {"report_to": []},
    }
    for section, values in sections.items():
        config[section] |= values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **config}))
    return path


def write_family(folder: Path, family: str, **changes: Any) -> str:
    """Writes a tiny model of a family next to the model of `write_run`. Returns the setting that names it."""
    source = folder / family
    shutil.copytree(
        folder / "source", source, ignore=shutil.ignore_patterns("*.safetensors", "*config.json")
    )
    shutil.copy(folder / "source" / "tokenizer_config.json", source)
    tiny_model(family, seed=1, **changes).save_pretrained(source)
    if is_seq2seq(family):  # to write the beginning of a line backwards
        config, lines = folder / "config.yaml", (folder / "text.txt").read_text().splitlines()
        rows = [
            json.dumps({"source": line[: 5 + i % 4], "target": line[4::-1]})
            for i, line in enumerate(lines)
        ]
        (folder / "pairs.jsonl").write_text("\n".join(rows))
        data = {"path": str(folder / "pairs.jsonl"), "format": "seq2seq", "packing": False}
        settings = yaml.safe_load(config.read_text())
        config.write_text(yaml.safe_dump(settings | {"data": settings["data"] | data}))
    return f"model.path={source}"


def config_for(path: Path, out: Path, *changes: str) -> RunConfig:
    return config_from_dict(read_config(path, [f"output_dir={out}", *changes]))


def run_here(
    config: RunConfig, resume: str | None = None, stop_at: int | None = None, between: int = 0
) -> bool:
    """Runs on every rank the run, or the rest of it. Asks it to stop during step `stop_at`.

    Args:
        between: or stops it before the first step (1), after the last one (2), or when weights are written (3).
    """
    # DeepSpeed collects garbage twice per cut; over all imports of torch that takes a second
    gc.freeze()
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())

    def current(requests: RequestListener) -> int:
        status = json.loads((Path(config.output_dir) / "status.json").read_text())
        return STOP if stop_at is not None and status["step"] >= stop_at - 1 else NOTHING

    places, asked = itertools.count(1), RunContext.stop_requested

    def stop_requested(context: RunContext) -> bool:
        request = STOP if next(places) == between else NOTHING
        with patch.object(RequestListener, "current", return_value=request):
            return asked(context)

    stopping = patch.object(RunContext, "stop_requested", stop_requested)
    with patch.object(RequestListener, "current", current), stopping:
        return run(OutputFolder(config.to_dict(), resume), Communicator())


def builds_of_a_start(config: RunConfig, resume: str | None = None) -> int:
    """Counts how often a run, or the rest of one, builds its modules until the first step."""
    with patch.object(read_shape, "build_on_meta", wraps=build_on_meta) as build:
        assert not run_here(config, resume, between=1)
    return build.call_count


def state_on_return(config: RunConfig, resume: str, stop_at: int) -> str:
    """Returns the state in status.json when `run_here` returns on this rank. Rank 0 takes a while to write it."""

    def write_slowly(folder: Path, status: Status) -> None:
        time.sleep(0.3 if status.state == "stopped" else 0)
        write_status(folder, status)

    with patch("loraprune_ds.checkpoint.layout.write_status", write_slowly):
        run_here(config, resume, stop_at)
    return json.loads((Path(config.output_dir) / "status.json").read_text())["state"]


def run_on_full_disk(config: RunConfig, resume: str, full_rank: int, name: str) -> tuple[str, int]:
    """Runs like `run_here`, but one rank has no room for files called `name`. Returns the error of the run."""

    def save_file_if_room(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        if Communicator().rank == full_rank and path.name == name:
            raise SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        save_file(tensors, path)

    full = patch("loraprune_ds.pretrained.weight_files.save_file", save_file_if_room)
    with full, pytest.raises(UserError) as caught:
        run_here(config, resume)
    return str(caught.value), caught.value.exit_code


def start_without_room(config: RunConfig) -> str:
    """Starts a run whose disk has no room for its model. Returns the refusal."""
    with patch("shutil.disk_usage", return_value=SimpleNamespace(free=1000, total=1000)):
        return refused(run_here, config)


def run_without_room_for(config: RunConfig, writer: str) -> tuple[str, int]:
    """Goes on like `run_here`, but finds the disk full when train/run.py calls `writer`. Returns the run's error."""
    write = getattr(run_module, writer)

    def write_on_full_disk(*given: Any) -> Any:
        with full_disk():
            return write(*given)

    with patch.object(run_module, writer, write_on_full_disk), pytest.raises(UserError) as caught:
        run_here(config, "auto")
    return str(caught.value), caught.value.exit_code


@dataclass(frozen=True)
class Found:
    """Describes the checkpoint that a start would resume from."""

    step: int | None
    warnings: list[str]
    error: str | None = None
    exit_code: int = 0


def find_here(config: RunConfig, resume: str) -> Found:
    warnings: list[str] = []
    try:
        output = OutputFolder(config.to_dict(), resume)
        assert output.start == "resume"
        dense = open_for_pruning(Path(config.model.path), config.model)
        saved = find_checkpoint(output, Communicator(), dense, warnings)
    except UserError as error:
        return Found(None, warnings, str(error), error.exit_code)
    return Found(saved.state.step if saved else None, warnings)


@dataclass(frozen=True)
class Contents:
    """Holds tensors and masks of one checkpoint: LoRA masters, moments, moving averages, kept groups of all layers."""

    lora: dict[str, Tensor]
    scores: dict[str, Tensor]
    kept: list[Any]


def contents(out: Path, step: int) -> Contents:
    folder = out / "checkpoints" / f"step-{step}"
    masters, moments = (
        sorted(folder.glob(pattern))
        for pattern in ("lora-*.safetensors", "resume/lora-*.safetensors")
    )
    lora = {
        f"{path.stem[-5:]}.{name}.master": tensor
        for path in masters
        for name, tensor in load_file(path).items()
    }
    lora |= {
        f"{path.stem[-5:]}.{name}": tensor
        for path in moments
        for name, tensor in load_file(path).items()
    }
    scores = folder / "resume" / "scores.safetensors"
    return Contents(
        lora, load_file(scores) if scores.exists() else {}, read_state(out, step)["kept"]
    )


def assert_bitwise(found: Contents, expected: Contents) -> None:
    assert found.kept == expected.kept
    for ours, theirs in ((found.lora, expected.lora), (found.scores, expected.scores)):
        assert_equal_tensors(ours, theirs)


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def assert_same_run(out: Path, straight: Path, step: int) -> None:
    """Checks that two runs have the same losses, last checkpoint of `step` and exported model, bit by bit."""
    assert losses(out) == losses(straight)
    assert_bitwise(contents(out, step), contents(straight, step))
    assert_equal_tensors(read_tensors(out / "model"), read_tensors(straight / "model"))


def read_tensors(folder: Path, names: str = "*") -> dict[str, Tensor]:
    """Reads all tensors of a folder, or of files with these names. A tensor in two files is an error."""
    tensors: dict[str, Tensor] = {}
    for path in folder.glob(f"{names}.safetensors"):
        found = load_file(path)
        assert not found.keys() & tensors.keys()
        tensors |= found
    return tensors


def read_state(out: Path, step: int) -> dict[str, Any]:
    return json.loads((out / "checkpoints" / f"step-{step}" / "state.json").read_text())


def metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def losses(out: Path) -> list[float]:
    steps = metrics(out, "step")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))  # each step once
    return [step["loss"] for step in steps]


TOLERANCE = 1e-5


def assert_close(out: Path, straight: Path, steps: int = STEPS) -> None:
    found, expected = contents(out, steps), contents(straight, steps)
    assert found.kept == expected.kept
    # moments relative to the largest: they have gradients' units
    for suffix in ("master", "exp_avg", "exp_avg_sq"):
        names = [name for name in expected.lora if name.endswith(f".{suffix}")]
        assert len(names) == 3 * 7 * 2
        scale = (
            1.0
            if suffix == "master"
            else max(float(expected.lora[name].abs().max()) for name in names)
        )
        assert (
            max(float((found.lora[n] - expected.lora[n]).abs().max()) for n in names)
            < TOLERANCE * scale
        ), suffix
    for name, scores in expected.scores.items():
        assert ((found.scores[name] - scores).abs() <= TOLERANCE * scores.abs()).all(), name
    assert resuming.losses(out) == pytest.approx(resuming.losses(straight), abs=TOLERANCE)
