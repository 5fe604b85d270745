"""Measures the cost of the quality settings in seconds, bytes and disk, beside what they replace.

    python -m tests.benchmarks.quality_cost [--ranks 2] [--models smollm2 1b] [--phases lora gradient ...]

SmolLM2-135M runs everything. A random LLaMA of 1.1 billion parameters, with activation checkpointing, shows the memory
of a criterion. The activations of a small model hide that memory. Each stretch is a launch of its own, so none inherits
another's memory.

  lora, gradient   a training step scored by either criterion.
  whole_gradient   the same step in one process that holds W's gradient whole, as LLM-Pruner does.
  lora_gradient    the same process with gradients of LoRA alone.
  cut, refit       the same cut to half of the linear parameters, plain and with the least-squares refit.
  teacher          the dense model's pass over the samples of a run, and the training steps over the same samples.

Memory is RssAnon + RssShmem of each rank, sampled every 5 ms. `peak` is all of it. `extra` is the memory above the
start of the stretch. `planned_extra` is the planner's number for it. The result goes to
tests/benchmarks/results/quality_cost.json.
"""

import argparse
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.config import DataConfig, EvaluateConfig, ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.files import read_json, write_json
from loraprune_ds.model.adapters import add_lora, lora_linear
from loraprune_ds.model.classes import decoder_layers
from loraprune_ds.model.dtypes import DTYPES
from loraprune_ds.model.embedded import embedded_model_dir
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.model.hub import locate_model
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.cluster import Cluster
from loraprune_ds.plan.distillation_pass import DistillationPass
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.request import build_request, read_config
from loraprune_ds.plan.stages import cut_stage, training_stage
from loraprune_ds.plan.traffic import simulate_passes
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.provenance import hardware, versions
from loraprune_ds.train.prepare import Prepared, prepare
from loraprune_ds.train.teacher_pass import find_teacher, record_teacher
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import device_name
from loraprune_ds.zero.engine import build_training_engine, quiet_deepspeed, start_ranks, stop_ranks
from tests.benchmarks.peak import Peak
from tests.benchmarks.plan_measured import make_random_1b
from tests.plan_cases import counted_bytes, planned_peak

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "quality_cost.json"
ONE_PROCESS = ("whole_gradient", "lora_gradient")
PHASES = {
    "smollm2": ("lora", "gradient", *ONE_PROCESS, "cut", "refit", "teacher"),
    "1b": ("lora", "gradient", *ONE_PROCESS),
}
STEPS = {"smollm2": 4, "1b": 2}  # that are timed
TEACHER_STEPS = 15  # of 8 samples, and one more: a file of outputs for each of two ranks


def make_config(arguments: argparse.Namespace) -> RunConfig:
    """Builds a config that cuts everything at the last step. A step has 1,024 tokens."""
    prune = PruneConfig(ratio=0.5, channel_multiple=1, prune_every=1, warmup_fraction=0.99, cooldown_fraction=0)
    changes: dict[str, dict[str, Any]] = {
        "gradient": {"criterion": "gradient"},
        "refit": {"compensate": "least_squares", "compensate_steps": 1},
    }
    return RunConfig(
        output_dir=str(arguments.folder),
        model=ModelConfig(path=str(arguments.source)),
        data=DataConfig(window=128),
        prune=replace(prune, **changes.get(arguments.phase, {})),
        train=TrainConfig(
            steps=(TEACHER_STEPS if arguments.phase == "teacher" else STEPS[arguments.model]) + 1,
            global_batch_size=8,
            micro_batch_size=4,
            gradient_checkpointing=arguments.model == "1b",
            learning_rate=1e-4,
            distill_weight=0.5 if arguments.phase == "teacher" else 0.0,
        ),
        evaluate=EvaluateConfig(window=128, max_windows=1),
    )


def measured(comm: Communicator, act: Callable[[], Any]) -> dict[str, Any]:
    gc.collect()
    comm.barrier()
    began = time.perf_counter()
    with Peak() as peak:
        act()
        comm.barrier()
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "peak_bytes": comm.gather_objects(peak.peak),
        "extra_bytes": comm.gather_objects(peak.extra),
    }


def steps_and_cut(config: RunConfig, prepared: Prepared, comm: Communicator) -> dict[str, Any]:
    """Times all steps between the first, which warms up, and the last, which measures for the cut after it."""
    engine = build_training_engine(config, prepared.pretrained, prepared.ds_config, prepared.steps)
    pruner = Pruner(engine.model, config.prune, prepared.schedule, prepared.limits, config.seed)
    trainer = Trainer(
        engine, pruner, prepared.samples, prepared.order, config.train, dtype=config.model.dtype, seed=config.seed
    )
    rows = [measured(comm, lambda step=step: trainer.step(step)) for step in range(1, prepared.steps + 1)]
    cut = measured(comm, lambda: trainer.cut(prepared.steps))
    return {"step": middle(rows[1:-1]), "last_step": rows[-1], "cut": cut}


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds, largest bytes."""
    largest = {key: [max(values) for values in zip(*(r[key] for r in rows), strict=True)] for key in _bytes(rows[0])}
    return {"seconds": statistics.median(row["seconds"] for row in rows), **largest}


def _bytes(row: dict[str, Any]) -> list[str]:
    return [key for key in row if key.endswith("_bytes")]


def teacher_phase(config: RunConfig, prepared: Prepared, comm: Communicator) -> dict[str, Any]:
    engine = build_training_engine(config, prepared.pretrained, prepared.ds_config, prepared.steps)
    pruner = Pruner(engine.model, config.prune, prepared.schedule, prepared.limits, config.seed)
    found = find_teacher(config, prepared, None, comm)
    samples = prepared.samples
    with counted_bytes(comm.world_size, comm.rank) as sent:
        recorded = measured(comm, lambda: record_teacher(engine, found, samples, config.recorded_at_once))
    recorded["sent_bytes"] = comm.gather_objects(sent["all_gather_into_tensor"])
    trainer = Trainer(
        engine, pruner, samples, prepared.order, config.train, dtype=config.model.dtype, seed=config.seed, teacher=found
    )
    trained = measured(comm, lambda: [trainer.step(step) for step in range(1, prepared.steps + 1)])
    on_disk = sum(path.stat().st_size for path in found.folder.glob("*.safetensors"))
    disk = {"disk_bytes": on_disk, "planned_disk_bytes": found.plan.bytes, "samples": len(found.plan.samples)}
    planned = planned_pass(config, prepared.pretrained.shape, comm.world_size)
    return {"pass": recorded | disk | planned, "training_on_them": trained}


def one_process_phase(config: RunConfig, prepared: Prepared, *, whole: bool) -> dict[str, Any]:
    """Runs one process without ZeRO. With `whole`, every frozen linear has a gradient of its own, too."""
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[config.model.dtype]
    base: Any = AutoModelForCausalLM.from_pretrained(locate_model(config.model), dtype=dtype)
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()  # mapped from the file it would count as no memory
    model = add_lora(base, open_pretrained(locate_model(config.model)).shape, config.lora, config.seed)
    if config.train.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in decoder_layers(model):
        for linear in LLAMA_LINEARS:
            lora_linear(layer, linear).base_layer.weight.requires_grad_(whole)
    model.train()
    comm, rows = Communicator(), []
    for step in range(prepared.steps):
        batch = prepared.samples.inputs(prepared.order.batch(step))["input_ids"]
        rows.append(measured(comm, lambda batch=batch: _whole_step(model, batch, config.train.micro_batch_size)))
    return {"step": middle(rows[1:])}


def _whole_step(model: Any, batch: torch.Tensor, micro: int) -> None:
    for ids in batch.split(micro):
        (model(input_ids=ids, labels=ids, use_cache=False).loss * len(ids) / len(batch)).backward()
    for parameter in model.parameters():
        parameter.grad = None


def planned_extra(config: RunConfig, shape: ModelShape, ranks: int) -> dict[str, int]:
    """Returns the planner's number for the bytes that a step and the cut add to those between steps."""
    request = build_request(
        config.model.path, read_config(config.model.path), shape, config, Cluster(nodes=1, gpus_per_node=ranks)
    )
    (passes,) = simulate_passes(request, [shape])
    step = training_stage("step", request, replace(passes, evaluation=PassTraffic()))
    cut = cut_stage("cut", request, shape, request.shape_at(request.schedule.ratio))
    return {"step": planned_peak(step, passes.training, request) - step.resident, "cut": cut.peak - cut.resident}


def planned_pass(config: RunConfig, shape: ModelShape, ranks: int) -> dict[str, int]:
    """Returns the planner's numbers for the dense model's pass.

    On CPU ranks the host's memory is the device's. gloo has a copy of what it gathers.
    """
    request = build_request(
        config.model.path, read_config(config.model.path), shape, config, Cluster(nodes=1, gpus_per_node=ranks)
    )
    (passes,) = simulate_passes(request, [shape])
    planned = DistillationPass(request, passes.evaluation)
    stage = planned.stage()
    copied = passes.evaluation.largest_gather if ranks > 1 else 0
    extra = stage.peak - stage.resident + stage.host["teacher_file"] + copied
    return {"planned_extra_bytes": extra, "planned_sent_bytes": planned.cost().sent["weights"]}


def rank_main(arguments: argparse.Namespace) -> None:
    quiet_deepspeed()
    comm = start_ranks()
    config = make_config(arguments)
    prepared = prepare(config, comm, is_first_on_node=comm.rank == 0)
    if arguments.phase in ONE_PROCESS:
        result = one_process_phase(config, prepared, whole=arguments.phase == "whole_gradient")
    elif arguments.phase == "teacher":
        result = teacher_phase(config, prepared, comm)
    else:
        result = steps_and_cut(config, prepared, comm)
        result["planned_extra_bytes"] = planned_extra(config, prepared.pretrained.shape, comm.world_size)
    if comm.rank == 0:
        config_facts = config.to_dict() | {"output_dir": "unused", "model": {"path": arguments.model}}
        facts = {"ranks": comm.world_size, "config": config_facts, "hardware": hardware(device_name())}
        write_json(arguments.folder / "result.json", {**result, **facts})
    stop_ranks()


def launch(phase: str, model: str, source: Path, ranks: int) -> dict[str, Any]:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    ranks = 1 if phase in ONE_PROCESS else ranks
    with tempfile.TemporaryDirectory(prefix="quality-cost-") as folder:
        command = [deepspeed, "--quiet", f"--num_accelerators={ranks}", Path(__file__), "--phase", phase]
        command += ["--folder", folder, "--model", model, "--source", source]
        freed_at_once = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}  # or glibc keeps it, and no later peak would show
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | freed_at_once
        subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
        return read_json(Path(folder) / "result.json")


def show(phases: dict[str, Any]) -> None:
    print(f"{'':<32}{'seconds':>9}{'peak of a rank':>16}{'extra':>12}")
    for phase, stretches in phases.items():
        for name, row in stretches.items():
            if isinstance(row, dict) and "peak_bytes" in row:
                peak, extra = max(row["peak_bytes"]) / 1e6, max(row["extra_bytes"]) / 1e6
                print(f"{phase + ', ' + name:<32}{row['seconds']:>9.2f}{peak:>13.0f} MB{extra:>9.0f} MB")


def measure_all(model: str, wanted: list[str] | None, ranks: int, result: Path) -> None:
    """Runs every wanted phase of a model. Keeps what was measured before."""
    models = read_json(result)["models"] if result.exists() else {}
    phases = models.setdefault(model, {})
    with tempfile.TemporaryDirectory(prefix="quality-cost-model-") as folder:
        source = Path("embedded") if model == "smollm2" else random_1b(Path(folder))
        for phase in PHASES[model]:
            if wanted is None or phase in wanted:
                phases[phase] = launch(phase, model, source, ranks) | {"versions": versions()}
                write_json(result, {"models": models})
    show(phases)


def random_1b(folder: Path) -> Path:
    """With SmolLM2's tokenizer and a vocabulary of its size."""
    make_random_1b(folder, vocab_size=49_152)
    for path in embedded_model_dir().glob("*token*"):
        shutil.copy(path, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(PHASES), default=list(PHASES))
    parser.add_argument("--phases", nargs="+", choices=PHASES["smollm2"], help="default: all of a model")
    parser.add_argument("--result", type=Path, default=RESULT, help="default: tests/benchmarks/results")
    for name in ("--phase", "--model", "--source"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        rank_main(arguments)
        return
    for model in arguments.models:
        measure_all(model, arguments.phases, arguments.ranks, arguments.result)


if __name__ == "__main__":
    main()
