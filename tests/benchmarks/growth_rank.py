"""Runs on each rank of `growth.py`. Measures bytes, CPU seconds and wall time of steps and a cut, by depth."""

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as ds_comm
from torch import Tensor

from loraprune_ds.config import ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.pruning.limits import make_limits
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.ds_config import resolve_ds_config
from loraprune_ds.zero.engine import build_training_engine, quiet_deepspeed, start_ranks, stop_ranks

WARM, MEASURED, WINDOW, BATCH = 2, 2, 32, 4  # DeepSpeed records its fetch trace in the first steps
CUT_STEP = WARM + MEASURED


@contextmanager
def counted_bytes(world_size: int) -> Iterator[list[float]]:
    """Counts the bytes this rank sends in the collectives of a step, by any caller.

    A ring sends (world_size - 1) / world_size of what is moved.
    """
    backend: Any = ds_comm.comm.cdb
    others = (world_size - 1) / world_size
    share = {
        "all_gather_into_tensor": lambda args: args[0].nbytes * others,  # the output; others send all but 1/world_size
        "reduce_scatter_tensor": lambda args: args[1].nbytes * others,
        "all_reduce": lambda args: 2 * args[0].nbytes * others,
    }
    sent = [0.0]
    originals = {name: getattr(backend, name) for name in share}

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            sent[0] += share[name](tensors)
            return call(*args, **kwargs)

        return wrapped

    for name, call in originals.items():
        setattr(backend, name, counting(name, call))
    try:
        yield sent
    finally:
        for name, call in originals.items():
            setattr(backend, name, call)


class Consecutive:
    """Returns samples [s * BATCH, (s + 1) * BATCH) as batch s."""

    def batch(self, step: int) -> Tensor:
        return torch.arange(step * BATCH, (step + 1) * BATCH)


def build(model: Path, comm: Communicator) -> Trainer:
    config = RunConfig(
        output_dir="unused",
        model=ModelConfig(path=str(model)),
        prune=PruneConfig(ratio=0.5, channel_multiple=1, protected_first=0, protected_last=0),
        train=TrainConfig(steps=CUT_STEP, global_batch_size=BATCH, micro_batch_size=BATCH // comm.world_size),
    )
    pretrained = open_pretrained(model)
    ds_config = resolve_ds_config("ds_configs/zero3.json", config, pretrained.shape, comm.world_size)
    # No weight stays gathered from forward to backward, as in a model that does not fit. DeepSpeed's own limits are far
    # above these small widths.
    ds_config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    engine = build_training_engine(config, pretrained, ds_config, CUT_STEP)
    limits = make_limits(config.prune, pretrained.shape)
    pruner = Pruner(engine.model, config.prune, Schedule(0.5, CUT_STEP - 1, CUT_STEP, 1), limits, config.seed)
    ids = torch.randint(pretrained.shape.vocab_size, (CUT_STEP * BATCH, WINDOW))
    return Trainer(
        engine, pruner, Samples.of_windows(ids), Consecutive(), config.train, dtype=config.model.dtype, seed=config.seed
    )


def measure(model: Path, comm: Communicator) -> dict[str, Any]:
    gc.collect()
    torch.manual_seed(0)
    trainer = build(model, comm)
    for step in range(1, WARM + 1):
        trainer.step(step)
    comm.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    with counted_bytes(comm.world_size) as sent:
        for step in range(WARM + 1, CUT_STEP + 1):
            trainer.step(step)
    step_row = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall, "bytes": sent[0]}
    comm.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    cut = trainer.pruner.cut(CUT_STEP)
    assert cut is not None
    cut_row = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    return {
        "step": {key: value / MEASURED for key, value in step_row.items()},
        "cut": cut_row | {"bytes": cut.bytes_sent},
        "weight_bytes": trainer.pruning_steps.weight_bytes[comm.rank],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    quiet_deepspeed()
    comm = start_ranks()
    gc.freeze()  # DeepSpeed collects garbage twice per cut, over all imports: that does not grow
    rows = {model.name: comm.gather_objects(measure(model, comm)) for model in arguments.models}
    if comm.rank == 0:
        arguments.result.write_text(json.dumps(rows))
    stop_ranks()


if __name__ == "__main__":
    main()
