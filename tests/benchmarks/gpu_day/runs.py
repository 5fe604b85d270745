"""Whole runs by their commands: every branch of the code for a GPU, fp16, and two ranks on one card."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.files import read_json, write_json
from loraprune_ds.ranks.device import is_cpu
from tests.benchmarks.gpu_day.found import Found
from tests.oracle.models import make_tiny_llama
from tests.support.examples import write_rows
from tests.support.launching import ROOT, free_port, on_ranks, run_to_end, step_of
from tests.support.resuming import metrics, write_family, write_run

OVERLAP = ROOT / "ds_configs" / "zero3_overlap.json"
# What a run on the card is compared in with the same run on the CPU. Each has other code on the device.
SETTINGS: dict[str, tuple[str, ...]] = {
    "lora": (),
    "global, least_squares": ("prune.ranking=global", "prune.compensate=least_squares"),
    "fisher, checkpointing": ("prune.criterion=fisher", "train.gradient_checkpointing=true"),
    "distillation": ("train.distill_weight=0.5",),
    "int8": ("model.frozen=int8",),
    "offload": ("deepspeed=ds_configs/zero3_offload.json",),
    "experts": ("mixtral",),
}
DETERMINISTIC = "train.deterministic=true"
NO_DROPOUT = "lora.lora_dropout=0.0"  # each device draws other masks


def whole_run(found: Found) -> None:
    """Prunes a tiny LLaMA, stops in the middle and goes on: kept groups as without a stop, or nearly."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _write_run(folder, dtype="bfloat16")
        _launch(config, f"output_dir={folder / 'straight'}")
        report = read_json(folder / "straight" / "report.json")
        found.row("perplexity of the exported model", report["perplexity"]["pruned"])
        steps = metrics(folder / "straight", "step")
        kept = ("seconds", "resident_bytes", "reserved_bytes")
        measured = {name: [step[name] for step in steps] for name in kept}
        found.keep(report=measured | {"perplexity": report["perplexity"]})
        found.row("stopped on request (1: yes)", int(_stop_and_go_on(config, folder / "out")), 1)
        _launch(config, DETERMINISTIC, f"output_dir={folder / 'again'}")
        straight, resumed, again = (_groups(folder / run) for run in ("straight", "out", "again"))
        found.row("deterministic: groups that differ after a resume", len(resumed - again), 0)
        found.row("not deterministic: groups that differ", len(straight - again))


def beside_cpu(found: Found) -> None:
    """Makes the same runs on the card and on the CPU, in fp32, one setting after the other."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _write_run(folder, dtype="float32")
        mixture = write_family(folder, "mixtral", num_hidden_layers=4)
        for setting, changes in SETTINGS.items():
            changes = [NO_DROPOUT, *(change.replace("mixtral", mixture) for change in changes)]
            runs = [folder / f"{setting} {where}" for where in ("card", "cpu")]
            devices: list[dict[str, str]] = [{}, {"DS_ACCELERATOR": "cpu"}]
            started = [
                _start(config, *changes, f"output_dir={x}", **y)
                for x, y in zip(runs, devices, strict=True)
            ]
            try:
                for process in started:
                    _end(process)
            except RuntimeError as error:  # the other settings may still tell something
                found.row(f"{setting}: failed", 1, 0, error=str(error))
                continue
            losses = [[step["loss"] for step in metrics(run, "step")] for run in runs]
            before_a_cut = [abs(a - b) for a, b in zip(*losses, strict=True)][:2]
            found.row(
                f"{setting}: largest difference of a loss before a cut",
                max(before_a_cut),
                0,
                losses=losses,
            )
            found.row(f"{setting}: groups that differ", len(_groups(runs[0]) - _groups(runs[1])), 0)


def fp16(found: Found) -> None:
    """Trains in fp16. The first loss scale is so high that steps are skipped. A stop must not change what follows."""
    if is_cpu():
        found.keep(skipped="CPUs do not train in fp16")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scaled = read_json(OVERLAP)
        scaled["fp16"]["initial_scale_power"] = 24
        write_json(folder / "fp16.json", scaled)
        config = _write_run(folder, dtype="float16", deepspeed=folder / "fp16.json")
        _launch(config, DETERMINISTIC, f"output_dir={folder / 'straight'}")
        straight = metrics(folder / "straight", "step")
        losses = [step["loss"] for step in straight]
        found.row("steps skipped, of 20", sum(step["skipped"] for step in straight), losses=losses)
        _stop_and_go_on(config, folder / "out")
        pairs = zip(straight, metrics(folder / "out", "step"), strict=True)
        other = sum((a["loss"], a["skipped"]) != (b["loss"], b["skipped"]) for a, b in pairs)
        found.row("steps that differ after a stop and a resume", other, 0)


def two_ranks(found: Found) -> None:
    """Runs two ranks on one card, with gloo in NCCL's place: real gathers, side streams and all-to-alls."""
    common = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    command = [
        sys.executable,
        "-c",
        "from tests.benchmarks.gpu_day import training; training.one_of_two_ranks()",
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=common | {"RANK": rank}, **pipes)
        for rank in ("0", "1")
    ]
    ended = [rank.communicate() for rank in ranks]  # what hangs ends with this part
    if any(rank.returncode for rank in ranks):
        raise RuntimeError(next(err for _, err in ended if err.strip())[-2000:])
    found.row("loss after a cut", float(ended[0][0].split()[-1]))


def fsdp2(found: Found) -> None:
    """Prunes by the example of FSDP2 on all cards, over NCCL, and on as many CPU ranks over gloo."""
    ranks = 1 if is_cpu() else torch.cuda.device_count()
    found.row("ranks of FSDP2", ranks)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        width = 64 if is_cpu() else 1024
        sizes: dict[str, Any] = {"hidden": width, "ffn": 3 * width, "heads": 8, "kv_heads": 4}
        model = make_tiny_llama(folder / "dense", layers=8, **sizes)
        rows = write_rows(folder / "rows.jsonl", ("text",))
        command = [*on_ranks(ranks, "torchrun"), str(ROOT / "launch/examples/fsdp_loop.py")]
        runs = {"card": {}, "cpu": {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}}
        for where, variables in runs.items():
            given = [str(model), str(rows), str(folder / where)]
            ended = run_to_end([*command, *given], cwd=ROOT, environment=variables)
            if ended.code:
                raise RuntimeError(ended.everything[-2000:])
        losses = [[step["loss"] for step in metrics(folder / where, "step")] for where in runs]
        differences = [abs(a - b) for a, b in zip(*losses, strict=True)]
        found.row("largest difference of a loss", max(differences), 0, losses=losses)
        card, cpu = (_groups(folder / where) for where in runs)
        found.row("groups that differ", len(card - cpu), 0)


def _write_run(folder: Path, *, dtype: str, deepspeed: Path = OVERLAP) -> Path:
    path = write_run(
        folder,
        model={"dtype": dtype},
        prune={"ratio": 0.3, "prune_every": 4, "channel_multiple": 8},
        train={"steps": 20, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-3},
    )
    path.write_text(path.read_text() + f"deepspeed: {deepspeed}\n")
    return path


def _stop_and_go_on(config: Path, output: Path) -> bool:
    """Asks a run to stop once it has begun, then resumes it. Returns whether it stopped."""
    output.mkdir()
    stopped = _launch(config, DETERMINISTIC, stop_in=output)
    _launch(config, DETERMINISTIC, "--resume", "auto")
    return stopped == 85


def _launch(config: Path, *changes: str, stop_in: Path | None = None) -> int:
    """Runs launch/run.py on one rank. Asks it to stop once it has begun, if `stop_in` is its folder."""
    process = _start(config, *changes)
    while stop_in is not None and process.poll() is None and not (stop_in / "STOP").exists():
        if step_of(stop_in) >= 1:
            (stop_in / "STOP").touch()
        time.sleep(0.02)
    return _end(process)


def _start(config: Path, *changes: str, **variables: str) -> subprocess.Popen[str]:
    overrides = [word for change in changes if "=" in change for word in ("--set", change)]
    others = [change for change in changes if "=" not in change]
    command = [sys.executable, "launch/run.py", "--config", str(config), *overrides, *others]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, **pipes)


def _end(process: subprocess.Popen[str]) -> int:
    """Waits for it and returns its exit code."""
    _, err = process.communicate()
    if process.returncode not in (0, 85):
        raise RuntimeError(f"{process.args}: {err[-2000:]}")
    return process.returncode


def _groups(output: Path) -> set[tuple[int, str, int]]:
    """Reads which groups a run has kept."""
    layers = enumerate(read_json(output / "kept_groups.json")["layers"])
    lists = (
        (i, kind, x) for i, layer in layers for kind, x in layer.items() if isinstance(x, list)
    )
    return {(i, kind, group) for i, kind, groups in lists for group in groups}
