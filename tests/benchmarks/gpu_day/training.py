"""Steps, cuts and offload of LLaMA-7B and 13B on random weights: seconds and bytes beside the plan."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile

from loraprune_ds.config import Criterion
from loraprune_ds.plan.plan import make_plan
from loraprune_ds.pruning.prunable_model import LayerKeep
from loraprune_ds.report.records import StepRecord
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.device import accelerator, is_cpu
from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks
from loraprune_ds.zero.memory import peak_bytes, resident_bytes
from tests.benchmarks.gpu_day.engine import device_bytes, make_request, make_trainer
from tests.benchmarks.gpu_day.sizes import Sizes, sizes

OVERLAP = "ds_configs/zero3_overlap.json"  # the default would wait at every fetch, of which one rank needs none
CRITERIA: tuple[Criterion, ...] = ("lora", "gradient")
TIMED = 3  # steps, after one that is not
GB, GIB = 1e9, 1 << 30


def steps() -> dict[str, Any]:
    """Times a step by micro-batch: without scoring, with it, and with the true gradient."""
    _start()
    size, rows, found = sizes("llama-7b"), list[dict[str, Any]](), dict[str, Any]()
    for micro_batch in size.micro_batches:
        for criterion in CRITERIA:
            request = make_request(size, micro_batch, deepspeed=OVERLAP, criterion=criterion)
            trainer, plan = make_trainer(size, request), make_plan(request)
            score, name = trainer.pruner.score, f"micro-batch {micro_batch}"
            if criterion == "lora":
                trainer.pruner.score = lambda step: None  # type: ignore[method-assign]
                records = _timed(trainer)
                found[f"{name}, plain"] = _describe(records) | _profiled(trainer)
                rows.append(_row(f"{name}, plain: s per step", None, _median(records)))
                trainer.pruner.score = score  # type: ignore[method-assign]
            records = _timed(trainer)
            found[f"{name}, {criterion}"] = _describe(records)
            rows.append(_row(f"{name}, {criterion}: s per step", plan.step.exposed, _median(records)))
            rows.append(_row(f"{name}, {criterion}: peak GiB", plan.stages[1].peak / GIB, peak_bytes() / GIB))
            if records[-1].mfu is not None:
                rows.append(_row(f"{name}, {criterion}: MFU", None, records[-1].mfu))
            trainer.engine.release()
    return {"rows": rows, "details": found}


def cuts() -> dict[str, Any]:
    """Times cuts of a multiple, then of odd widths, and the steps at each width."""
    _start()
    size = sizes("llama-7b")
    request = make_request(size, size.micro_batches[-1], deepspeed=OVERLAP)
    trainer = make_trainer(size, request)
    rows = [_row("dense: s per step", make_plan(request).step.exposed, _median(_timed(trainer)))]
    aligned = [_cut(trainer, size.multiple) for _ in range(size.cuts)]
    rows.append(_row("cut of a multiple: s", None, statistics.median(cut["seconds"] for cut in aligned)))
    rows.append(_row("  of GB that it frees", _freed(trainer, size) / GB, _measured_free(aligned[-1]) / GB))
    rows.append(_row("at a multiple: s per step", None, _median(_timed(trainer))))
    odd = [_cut(trainer, channels) for channels in (1, 2, 4)]
    rows.append(_row("at an odd width: s per step", None, _median(_timed(trainer))))
    return {"rows": rows, "multiples": aligned, "odd": odd}


def offload() -> dict[str, Any]:
    """Makes steps and cuts with all weights on the host."""
    _start()
    size = sizes("llama-13b")
    request = make_request(size, 1, deepspeed="ds_configs/zero3_offload.json")
    trainer = make_trainer(size, request)
    rows = [_row("s per step", make_plan(request).step.exposed, _median(_timed(trainer)))]
    found = [_cut(trainer, size.multiple) for _ in range(min(3, size.cuts))]
    rows.append(_row("cut: s", None, statistics.median(cut["seconds"] for cut in found)))
    return {"rows": rows, "cuts": found}


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
    """Splits two steps into kernels and the rest, and counts the waits for the device."""
    began = time.perf_counter()
    with profile() as profiler:
        for _ in range(2):
            trainer.step(1)
    events = profiler.key_averages()
    waits = sum(event.count for event in events if event.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    kernels = sum(event.self_device_time_total for event in events) / 1e6
    return {"profiled_seconds": time.perf_counter() - began, "kernel_seconds": kernels, "waits": waits}


def _cut(trainer: Trainer, channels: int) -> dict[str, Any]:
    """Takes the last `channels` of every layer."""
    before = device_bytes() | {"host": resident_bytes()}
    keep = [
        LayerKeep(heads=torch.arange(x["heads"]), channels=torch.arange(x["channels"] - channels))
        for x in _layers(trainer)
    ]
    seconds = _seconds(lambda: trainer.model.cut(keep))
    trainer.pruner.average.scores = None
    return {"seconds": seconds, "before": before, "after": device_bytes() | {"host": resident_bytes()}}


def _layers(trainer: Trainer) -> Any:
    return trainer.model.shape.layers


def _seconds(act: Callable[[], Any]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _freed(trainer: Trainer, size: Sizes) -> int:
    shape = trainer.model.shape
    return 2 * len(shape.layers) * size.multiple * shape.group_numel("channels")  # bf16


def _measured_free(cut: dict[str, Any]) -> int:
    key = "host" if is_cpu() else "allocated"
    return cut["before"][key] - cut["after"][key]


def _row(what: str, planned: float | None, measured: float) -> dict[str, Any]:
    return {"what": what, "planned": planned, "measured": measured}
