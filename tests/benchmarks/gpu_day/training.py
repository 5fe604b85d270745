"""Steps, cuts and offload of LLaMA-7B and 13B on random weights: seconds and bytes next to the plan."""

import statistics
import time
from cProfile import Profile
from pstats import Stats
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import profile

from loraprune_ds.config import Criterion
from loraprune_ds.plan.plan import make_plan
from loraprune_ds.pruning.prunable_model import LayerKeep
from loraprune_ds.report.records import StepRecord
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.device import accelerator, is_cpu, peak_bytes
from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks, stop_ranks
from tests.benchmarks.gpu_day.engine import Sizes, device_bytes, make_request, make_trainer, sizes
from tests.benchmarks.gpu_day.found import Found

OVERLAP = "ds_configs/zero3_overlap.json"  # the default would wait at every fetch, of which one rank needs none
CRITERIA: tuple[Criterion, ...] = ("lora", "fisher")
TIMED = 3  # steps, after one that is not
GB, GIB = 1e9, 1 << 30
SMALL = Sizes(256, 4, 8, 1024, 97, 64, (2,), (), (), (), 64, 1)  # of two ranks on one card
# Where the seconds of a cut may go, as cProfile names them: file and function.
PHASES = (
    ("cut.py", "parameter_cuts"),
    ("flat.py", "take"),
    ("comm.py", "all_to_all"),
    ("cut.py", "_by_item"),
    ("params.py", "install_shard"),
    ("optimizer.py", "rebuild"),
    ("engine.py", "empty_partition_cache"),
    ("device.py", "empty_host_cache"),
    ("device.py", "settle_shards"),
)


def steps(found: Found) -> None:
    """Times a step by micro-batch: without scoring, by `lora` and by `fisher`."""
    _start()
    size = sizes("llama-7b")
    for micro_batch in size.micro_batches:
        for criterion in CRITERIA:
            request = make_request(size, micro_batch, deepspeed=OVERLAP, criterion=criterion)
            trainer, plan = make_trainer(size, request), make_plan(request)
            name = f"micro-batch {micro_batch}"
            if criterion == "lora":
                with patch.object(trainer.pruner, "score", lambda step: None):
                    records = _timed(trainer)
                    found.row(f"{name}, plain: s per step", _median(records), **_describe(records))
                    found.row(f"{name}, plain: kernels' part of the time", **_profiled(trainer))
            records = _timed(trainer)
            name = f"{name}, {criterion}"
            found.row(f"{name}: s per step", _median(records), plan.step.total.at_most, **_describe(records))
            found.row(f"{name}: peak GiB", peak_bytes() / GIB, plan.stages[0].peak / GIB)
            if records[-1].mfu is not None:
                found.row(f"{name}: MFU", records[-1].mfu)
            trainer.engine.release()


def cuts(found: Found) -> None:
    """Times cuts of a multiple, then of odd widths, and the steps at each width."""
    _start()
    size = sizes("llama-7b")
    request = make_request(size, size.micro_batches[-1], deepspeed=OVERLAP)
    trainer = make_trainer(size, request)
    found.row("dense: s per step", _median(_timed(trainer)), make_plan(request).step.total.at_most)
    aligned = [_cut(trainer, size.multiple) for _ in range(size.cuts)]
    found.keep(multiples=aligned)
    found.row("cut of a multiple: s", statistics.median(cut["seconds"] for cut in aligned))
    found.row("  of GB that it frees", _measured_free(aligned[-1]) / GB, _freed(trainer, size) / GB)
    found.row("at a multiple: s per step", _median(_timed(trainer)))
    with Profile() as profiler:
        odd = [_cut(trainer, 1)]
    found.keep(phases=_phases(profiler), odd=odd + [_cut(trainer, channels) for channels in (2, 4)])
    found.row("at an odd width: s per step", _median(_timed(trainer)))


def offload(found: Found) -> None:
    """Makes steps and cuts with all weights on the host."""
    _start()
    size = sizes("llama-13b")
    request = make_request(size, 1, deepspeed="ds_configs/zero3_offload.json")
    trainer = make_trainer(size, request)
    found.row("s per step", _median(_timed(trainer)), make_plan(request).step.total.at_most)
    made = [_cut(trainer, size.multiple) for _ in range(min(3, size.cuts))]
    found.row("cut: s", statistics.median(cut["seconds"] for cut in made), cuts=made)
    found.row("  of GB that it frees on the host", _measured_free(made[-1], "host") / GB, _freed(trainer, size) / GB)


def one_of_two_ranks() -> None:
    """Runs one rank of `runs.two_ranks`. Prints the loss after a cut."""
    if not is_cpu():
        accelerator().communication_backend_name = lambda: "gloo"  # NCCL takes no two ranks on one card
    quiet_deepspeed()
    comm = start_ranks()
    trainer = make_trainer(SMALL, make_request(SMALL, 2, deepspeed=OVERLAP, ranks=2))
    trainer.step(1)
    trainer.model.cut([LayerKeep(heads=torch.arange(6), channels=torch.arange(960)) for _ in range(SMALL.layers)])
    trainer.pruner.average.scores = None
    loss = trainer.step(2).loss
    if comm.rank == 0:
        print(loss, flush=True)
    stop_ranks()


def _start() -> None:
    quiet_deepspeed()
    start_ranks()


def _timed(trainer: Trainer) -> list[StepRecord]:
    accelerator().reset_peak_memory_stats()
    return [trainer.step(1) for _ in range(1 + TIMED)][1:]


def _median(records: list[StepRecord]) -> float:
    return statistics.median(record.seconds for record in records)


def _describe(records: list[StepRecord]) -> dict[str, Any]:
    last = records[-1]
    return {
        "seconds": [record.seconds for record in records],
        "tokens_per_second": last.tokens_per_second,
        "mfu": last.mfu,
        "peak_bytes": peak_bytes(),
        **device_bytes(),
    }


def _profiled(trainer: Trainer) -> dict[str, Any]:
    """Measures the kernels' part of the time of two steps, and counts the waits for the device."""
    began = time.perf_counter()
    with profile() as profiler:
        for _ in range(2):
            trainer.step(1)
    seconds = time.perf_counter() - began
    events = profiler.key_averages()
    waits = sum(event.count for event in events if event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    kernels = sum(event.self_device_time_total for event in events) / 1e6
    return {"measured": kernels / seconds, "seconds": seconds, "waits": waits}


def _cut(trainer: Trainer, channels: int) -> dict[str, Any]:
    """Takes the last `channels` of every layer."""
    before = device_bytes()
    keep = [
        LayerKeep(heads=torch.arange(x["heads"]), channels=torch.arange(x["channels"] - channels))
        for x in trainer.model.shape.layers
    ]
    began = time.perf_counter()
    trainer.model.cut(keep)
    seconds = time.perf_counter() - began
    trainer.pruner.average.scores = None
    return {"seconds": seconds, "before": before, "after": device_bytes()}


def _freed(trainer: Trainer, size: Sizes) -> int:
    shape = trainer.model.shape
    return 2 * len(shape.layers) * size.multiple * shape.group_numel("channels")  # bf16


def _measured_free(cut: dict[str, Any], where: str | None = None) -> int:
    where = where or ("host" if is_cpu() else "allocated")
    return cut["before"][where] - cut["after"][where]


def _phases(profiler: Profile) -> dict[str, float]:
    """Returns the seconds of a cut's parts. Some lie inside others. What a kernel takes shows where the host waits."""
    stats: dict[tuple[str, int, str], Any] = vars(Stats(profiler))["stats"]
    return {
        f"{file}: {function}": sum(
            numbers[3] for (path, _, name), numbers in stats.items() if path.endswith(file) and name == function
        )
        for file, function in PHASES
    }
