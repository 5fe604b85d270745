"""Steps, cuts and offload of LLaMA-7B and 13B on random weights: seconds and bytes next to the plan."""

import statistics
import time
from cProfile import Profile
from pathlib import Path
from pstats import Stats
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import profile

from loraprune_ds.config_types import Criterion
from loraprune_ds.engines import run_engine
from loraprune_ds.plan.plan import make_plan
from loraprune_ds.pruning.prunable_model import LayerKeep
from loraprune_ds.ranks.comm import stop_ranks
from loraprune_ds.ranks.device import is_cpu, peak_bytes
from loraprune_ds.ranks.job import silence_libraries
from loraprune_ds.report.records import StepRecord
from loraprune_ds.zero.device import accelerator
from tests.benchmarks.gpu_day.engine import Sizes, device_bytes, make_trainer, sizes
from tests.benchmarks.gpu_day.found import Found
from tests.support.driver import ShardedTrainer

CRITERIA: tuple[Criterion, ...] = ("lora", "fisher")
TIMED = 3  # steps, after one that is not
GB, GIB = 1e9, 1 << 30
SMALL = Sizes(256, 4, 8, 1024, 97, 64, (2,), 64, 1)  # of two ranks on one card


def steps(found: Found) -> None:
    """Times a step by micro-batch: without scoring, by `lora` and by `fisher`."""
    _start()
    size = sizes("llama-7b")
    for micro_batch in size.micro_batches:
        for criterion in CRITERIA:
            trainer, request = make_trainer(size, micro_batch_size=micro_batch, criterion=criterion)
            name = f"micro-batch {micro_batch}"
            if criterion == "lora":
                with patch.object(trainer.pruner, "score", lambda step: None):
                    _timed(trainer, found, f"{name}, plain: s per step")
                    found.row(f"{name}, plain: kernels' part of the time", **_profiled(trainer))
            name = f"{name}, {criterion}"
            _timed(trainer, found, f"{name}: s per step")
            found.row(
                f"{name}: peak GiB", peak_bytes() / GIB, make_plan(request).stages[0].peak / GIB
            )
            trainer.engine.release()


def cuts(found: Found) -> None:
    """Times cuts of a multiple, then of odd widths, and the steps at each width."""
    _start()
    size = sizes("llama-7b")
    trainer, _ = make_trainer(size, micro_batch_size=size.micro_batches[-1])
    _timed(trainer, found, "dense: s per step")
    _cuts(trainer, found, size, size.cuts, "host" if is_cpu() else "allocated")
    _timed(trainer, found, "at a multiple: s per step")
    with Profile() as profiler:
        odd = [_cut(trainer, 1)]
    # A kernel's time shows where the host waits for it. Some parts lie inside others.
    stats: dict[tuple[str, int, str], Any] = vars(Stats(profiler))["stats"]
    phases = {
        f"{Path(path).name}: {name}": x[3]
        for (path, _, name), x in stats.items()
        if "/loraprune_ds/" in path
    }
    found.keep(phases=phases, odd=odd + [_cut(trainer, channels) for channels in (2, 4)])
    _timed(trainer, found, "at an odd width: s per step")


def offload(found: Found) -> None:
    """Makes steps and cuts with all weights on the host."""
    _start()
    size = sizes("llama-13b")
    trainer, _ = make_trainer(size, deepspeed="ds_configs/zero3_offload.json")
    _timed(trainer, found, "s per step")
    _cuts(trainer, found, size, min(3, size.cuts), "host")


def one_of_two_ranks() -> None:
    """Runs one rank of `runs.two_ranks`. Prints the loss after a cut."""
    if not is_cpu():
        # NCCL takes no two ranks on one card
        accelerator().communication_backend_name = lambda: "gloo"
    silence_libraries()
    comm = run_engine(sharded=True).start_ranks()
    trainer, _ = make_trainer(SMALL, ranks=2, micro_batch_size=2)
    trainer.step(1)
    trainer.model.cut(
        [LayerKeep(heads=torch.arange(6), channels=torch.arange(960)) for _ in range(SMALL.layers)]
    )
    trainer.pruner.average.scores = None
    loss = trainer.step(2).loss
    if comm.rank == 0:
        print(loss, flush=True)
    stop_ranks()


def _start() -> None:
    silence_libraries()
    run_engine(sharded=True).start_ranks()


def _timed(trainer: ShardedTrainer, found: Found, what: str) -> StepRecord:
    """Adds the row of a few steps. Returns the record of the last one."""
    accelerator().reset_peak_memory_stats()
    _, *records = [trainer.step(1) for _ in range(1 + TIMED)]
    seconds, last = [record.seconds for record in records], records[-1]
    speed = {"seconds": seconds, "tokens_per_second": last.tokens_per_second}
    found.row(what, statistics.median(seconds), **speed, peak_bytes=peak_bytes(), **device_bytes())
    return last


def _profiled(trainer: ShardedTrainer) -> dict[str, Any]:
    """Measures the kernels' part of the time of two steps, and counts the waits for the device."""
    began = time.perf_counter()
    with profile() as profiler:
        for _ in range(2):
            trainer.step(1)
    seconds = time.perf_counter() - began
    events = profiler.key_averages()
    waits = sum(
        event.count
        for event in events
        if event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize")
    )
    kernels = sum(event.self_device_time_total for event in events) / 1e6
    return {"measured": kernels / seconds, "seconds": seconds, "waits": waits}


def _cuts(trainer: ShardedTrainer, found: Found, size: Sizes, count: int, where: str) -> None:
    """Cuts `size.multiple` channels from every layer so often, and adds the rows of that."""
    made = [_cut(trainer, size.multiple) for _ in range(count)]
    shape, last = trainer.model.shape, made[-1]
    freed = 2 * len(shape.layers) * size.multiple * shape.group_numel["channels"]  # bf16
    found.row("cut of a multiple: s", statistics.median(cut["seconds"] for cut in made), cuts=made)
    found.row(
        f"  of GB that it frees ({where})",
        (last["before"][where] - last["after"][where]) / GB,
        freed / GB,
    )


def _cut(trainer: ShardedTrainer, channels: int) -> dict[str, Any]:
    """Takes the last `channels` of every layer."""
    before = device_bytes()
    keep = [
        LayerKeep(heads=torch.arange(x["heads"]), channels=torch.arange(x["channels"] - channels))
        for x in trainer.model.shape.counts
    ]
    began = time.perf_counter()
    trainer.model.cut(keep)
    seconds = time.perf_counter() - began
    trainer.pruner.average.scores = None
    return {"seconds": seconds, "before": before, "after": device_bytes()}
