"""Runs on each rank of `wide_layers.py`: load, train, cut twice, save, export, read back. Measures every phase."""

import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from loraprune_ds.checkpoint.load import TrainingCheckpoint
from loraprune_ds.config import DataConfig, ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.config_types import Frozen
from loraprune_ds.engine.ds_config import resolve_ds_config
from loraprune_ds.engines import run_engine
from loraprune_ds.export.huggingface import write_model
from loraprune_ds.export.model_card import card_of_step
from loraprune_ds.pretrained.pretrained import PretrainedModel, open_for_pruning, open_pretrained
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.ranks.comm import Communicator, stop_ranks
from loraprune_ds.ranks.device import device_name
from loraprune_ds.ranks.job import silence_libraries
from loraprune_ds.train.data.samples import Samples
from tests.benchmarks.memory import Peak, tell
from tests.benchmarks.running import make_parser
from tests.support.driver import Consecutive, ShardedTrainer, assemble, save
from tests.support.paper import PAPER

STEPS, WINDOW = 3, 16
# step -> fraction of the decoder's linear parameters that is gone after it
CUTS = {1: 0.25, 2: 0.5}


class FixedSchedule(Schedule):
    """Cuts at the given steps only."""

    def fraction(self, step: int) -> float:
        return CUTS[step] / self.goal.ratio

    @cached_property
    def cut_steps(self) -> list[int]:
        return [*CUTS]


@dataclass
class Phases:
    """Holds seconds of each phase, and the bytes this rank held before it and at its peak."""

    rows: dict[str, dict[str, float]] = field(default_factory=dict)

    def measure(self, name: str, act: Callable[[], Any]) -> Any:
        gc.collect()
        began = time.perf_counter()
        with Peak() as peak:
            value = act()
        seconds = time.perf_counter() - began
        self.rows[name] = {
            "seconds": seconds,
            "before": peak.before,
            "peak": peak.peak,
            "extra": peak.extra,
        }
        return value


def make_config(folder: Path, ranks: int, frozen: Frozen | None, *, refit: bool) -> RunConfig:
    # A CPU's product of odd widths copies a 16-bit weight. Next to 4 bits that would count.
    multiple = 64 if frozen == "nf4" else 1
    train: Any = {"steps": STEPS, "global_batch_size": ranks, "micro_batch_size": 1}
    return RunConfig(
        output_dir="unused",
        deepspeed=str(folder / "ds.json"),
        model=ModelConfig(path=str(folder / "model"), frozen=frozen),
        data=DataConfig(window=WINDOW),
        prune=PruneConfig(
            **PAPER
            | {
                "ratio": 0.5,
                "channel_multiple": multiple,
                "protected_first": 0,
                "protected_last": 0,
            }
            | {"compensate": "least_squares" if refit else "none"}
        ),
        train=TrainConfig(
            **train, learning_rate=1e-4, gradient_checkpointing=True, distill_weight=0
        ),
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument(
        "--control", action="store_true", help="the last rank materialises the full weights"
    )
    parser.add_argument("--frozen", choices=get_args(Frozen), help="how to hold the linears")
    parser.add_argument("--refit", action="store_true", help="refit at each cut")
    arguments = parser.parse_args()
    folder, rank = arguments.folder, int(os.environ["RANK"])
    tell(folder, rank)
    silence_libraries()
    library = run_engine(sharded=True)
    comm = library.start_ranks()
    config = make_config(folder, comm.world_size, arguments.frozen, refit=arguments.refit)
    phases = Phases()
    pretrained = open_for_pruning(folder / "model", config.model)
    pretrained = pretrained.with_refits(config.prune.compensate)
    ds_config = resolve_ds_config(config, pretrained.shape, {}, comm.world_size, comm.world_size)
    hoard = materialise(pretrained) if arguments.control and rank == comm.world_size - 1 else []
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        pretrained.shape.vocab_size, (STEPS * comm.world_size, WINDOW), generator=generator
    )
    result = train_and_export(folder, config, pretrained, ds_config, ids, phases, comm)
    del hoard
    gc.collect()
    given = ("sdpa", "bfloat16", ds_config)
    engine = phases.measure(
        "reload",
        lambda: library.build_inference_engine(open_pretrained(folder / "exported"), *given),
    )
    result |= {
        "phases": phases.rows,
        "loss_reloaded": evaluate(engine.module, ids),
        "device": device_name(),
    }
    (folder / f"result-{rank}.json").write_text(json.dumps(result))
    stop_ranks()


def materialise(pretrained: PretrainedModel) -> list[Tensor]:
    """Materialises all weights whole, which no rank may do."""
    sizes = {
        name: torch.Size(shape).numel() for name, shape in pretrained.shape.parameters().items()
    }
    return [
        pretrained.weights.read_flat(name, 0, numel, torch.bfloat16)
        for name, numel in sizes.items()
    ]


def train_and_export(
    folder: Path,
    config: RunConfig,
    pretrained: PretrainedModel,
    ds_config: dict[str, Any],
    ids: Tensor,
    phases: Phases,
    comm: Communicator,
) -> dict[str, Any]:
    """Runs all that needs the training engine, which ends with this call."""
    given = (
        config,
        pretrained,
        ds_config,
        Samples.of_windows(ids),
        Consecutive(comm.world_size),
        STEPS,
    )
    trainer = phases.measure("load", lambda: assemble(*given, FixedSchedule))
    model = trainer.model
    losses = train(trainer, phases)
    checkpoint: TrainingCheckpoint = phases.measure(
        "checkpoint", lambda: save(trainer, config, folder / "saved")
    )
    saved = sum(path.stat().st_size for path in (folder / "saved").rglob("*") if path.is_file())
    exported = folder / "exported"
    comm.on_rank_0(exported.mkdir)
    card = card_of_step(checkpoint)
    phases.measure("export", lambda: write_model(checkpoint, exported, card, comm))
    trained = evaluate(trainer.engine.deepspeed, ids)
    layers = [dict(layer) for layer in model.shape.counts]
    return {
        "losses": losses,
        "loss_trained": trained,
        "layers_at_the_end": layers,
        "checkpoint_bytes": saved,
    }


def train(trainer: ShardedTrainer, phases: Phases) -> list[float]:
    observe, losses = trainer.pruner.score, []
    for step in range(1, STEPS + 1):
        trainer.pruner.score = lambda s: phases.measure(f"scoring {s}", lambda: observe(s))  # type: ignore[method-assign]
        losses.append(phases.measure(f"step {step}", lambda step=step: trainer.step(step)).loss)
        if step in CUTS:
            phases.measure(f"cut {step}", lambda step=step: trainer.cut(step))
    return losses


@torch.no_grad()
def evaluate(engine: Any, ids: Tensor) -> float:
    """Mean loss of one window, the same on every rank."""
    engine.eval()
    return float(engine(input_ids=ids[:1], labels=ids[:1]).mean())


if __name__ == "__main__":
    main()
