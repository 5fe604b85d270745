"""Measures size, seconds and host memory of a checkpoint and of a resume: SmolLM2-135M in bf16.

    python -m tests.benchmarks.checkpoint_cost [--ranks 2] [--model FOLDER]

Launches the ranks twice. The first launch trains a step at a time and saves three times. It saves before any cut, after
a cut, and after the cut with the frozen weights. `prune.compensate` and `checkpoint.copy_source` ask for the last form.
The second launch has fresh processes. It verifies both checkpoints of the smaller model. Then it rebuilds the sharded
model from each of them. For comparison it also builds a fresh model from the dense source.

Memory is RssAnon + RssShmem of each rank, sampled every 5 ms. What the rank held at the start of the stretch is taken
off. The result goes to tests/benchmarks/results/checkpoint_cost.json.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraprune_ds.checkpoint.layout import numbered, step_folder
from loraprune_ds.checkpoint.load import TrainingCheckpoint, open_training_checkpoint
from loraprune_ds.checkpoint.run_folder import CHECKPOINTS_FOLDER
from loraprune_ds.checkpoint.state import RunTotals
from loraprune_ds.config import (
    CheckpointConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    PruneConfig,
    RunConfig,
    TrainConfig,
)
from loraprune_ds.files import read_json, write_json
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.provenance import hardware, versions
from loraprune_ds.train.checkpoints import Checkpoints, build_engine
from loraprune_ds.train.prepare import Prepared, prepare
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.device import device_name
from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks, stop_ranks
from loraprune_ds.zero.memory import gather_weight_bytes
from tests.benchmarks.peak import Peak

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parent / "results" / "checkpoint_cost.json"


def make_config(folder: Path, model: str) -> RunConfig:
    """Builds a config with one cut, after step 2, to half of the decoder's linear parameters."""
    return RunConfig(
        output_dir=str(folder),
        model=ModelConfig(path=model),
        data=DataConfig(window=128),
        prune=PruneConfig(ratio=0.5, channel_multiple=1, prune_every=2, warmup_fraction=0.5, cooldown_fraction=0.25),
        train=TrainConfig(steps=4, global_batch_size=12, micro_batch_size=1, learning_rate=1e-4),
        evaluate=EvaluateConfig(window=128, max_windows=1),
        checkpoint=CheckpointConfig(keep_last=4),  # so that the folders tell what was written
    )


def measured(comm: Communicator, act: Callable[[], Any]) -> dict[str, Any]:
    """Measures seconds until all ranks are done, and the memory that each rank held on top."""
    gc.collect()
    comm.barrier()
    began = time.perf_counter()
    with Peak() as peak:
        kept = act()
        comm.barrier()
    del kept
    return {"seconds": time.perf_counter() - began, "extra_bytes_per_rank": comm.gather_objects(peak.extra)}


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def save_phase(config: RunConfig, prepared: Prepared, comm: Communicator) -> dict[str, Any]:
    """Saves three times: before any cut, after a cut, and after it with the frozen weights."""
    engine = build_engine(config, prepared, None)
    pruner = Pruner(engine.model, config.prune, prepared.schedule, prepared.limits, config.seed)
    trainer = Trainer(
        engine, pruner, prepared.samples, prepared.order, config.train, dtype=config.model.dtype, seed=config.seed
    )
    copying = replace(config, checkpoint=replace(config.checkpoint, copy_source=True))
    slices, copies = (Checkpoints(kind, prepared, pruner, None) for kind in (config, copying))
    root = Path(config.output_dir) / CHECKPOINTS_FOLDER
    cut_steps, result = prepared.schedule.cut_steps(), {}
    names = {1: "before_any_cut", cut_steps[-1]: "after_a_cut", cut_steps[-1] + 1: "with_the_frozen_weights"}
    for step in range(1, cut_steps[-1] + 2):
        trainer.step(step)
        trainer.cut(step)
        if step not in names:
            continue
        checkpoints = copies if names[step] == "with_the_frozen_weights" else slices
        before = {path.name for path in root.glob("*")}
        row = measured(comm, lambda step=step, kind=checkpoints: kind.save(engine, step, RunTotals()))
        written = {path.name: folder_bytes(path) for path in sorted(root.iterdir()) if path.name not in before}
        row |= {"bytes_written": sum(written.values()), "folders": written}
        row["weight_bytes_per_rank"] = gather_weight_bytes(engine.model)
        result[names[step]] = row
    return result


def resume_phase(config: RunConfig, prepared: Prepared, comm: Communicator) -> dict[str, Any]:
    """Times verification and the model, from slices and from copies. Builds the dense model for comparison."""
    root = Path(config.output_dir) / CHECKPOINTS_FOLDER
    *_, slices, copies = numbered(root, "step")
    found: list[TrainingCheckpoint] = []
    result = {}
    for name, number in {"slices": slices, "copies": copies}.items():
        folder = step_folder(root, number)
        result[f"verify_{name}"] = measured(
            comm, lambda folder=folder: found.append(open_training_checkpoint(folder, comm))
        )
        result[f"rebuild_{name}"] = measured(comm, lambda: build_engine(config, prepared, found[-1]))
        gc.collect()
    result["fresh_dense_model"] = measured(comm, lambda: build_engine(config, prepared, None))
    return result


def rank_main(arguments: argparse.Namespace) -> None:
    quiet_deepspeed()
    comm = start_ranks()
    config = make_config(arguments.folder / "out", arguments.model)
    prepared = prepare(config, comm, is_first_on_node=comm.rank == 0)
    phase = save_phase if arguments.phase == "save" else resume_phase
    result = phase(config, prepared, comm)
    if comm.rank == 0:
        facts = {"config": config.to_dict(), "hardware": hardware(device_name())}
        write_json(arguments.folder / f"{arguments.phase}.json", {"result": result, **facts})
    stop_ranks()


def launch(phase: str, arguments: argparse.Namespace) -> dict[str, Any]:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [deepspeed, "--quiet", f"--num_accelerators={arguments.ranks}", Path(__file__), "--phase", phase]
    command += ["--folder", arguments.folder, "--model", arguments.model]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
    return read_json(arguments.folder / f"{phase}.json")


def show(result: dict[str, Any]) -> None:
    print(f"{'':<24}{'written':>10}{'seconds':>9}  extra memory of a rank")
    for name, row in {**result["save"], **result["resume"]}.items():
        written = f"{row['bytes_written'] / 1e6:.1f} MB" if "bytes_written" in row else ""
        extra = max(row["extra_bytes_per_rank"]) / 1e6
        print(f"{name.replace('_', ' '):<24}{written:>10}{row['seconds']:>9.2f}  {extra:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--phase", choices=("save", "resume"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        rank_main(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="checkpoint-cost-") as name:
        arguments.folder = Path(name)
        save, resume = launch("save", arguments), launch("resume", arguments)
    config = save["config"] | {"output_dir": "unused"}
    facts = {"ranks": arguments.ranks, "config": config, "versions": versions(), "hardware": save["hardware"]}
    result = {"save": save["result"], "resume": resume["result"], **facts}
    write_json(RESULT, result)
    show(result)


if __name__ == "__main__":
    main()
