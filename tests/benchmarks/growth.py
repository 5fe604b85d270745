"""Measures how the cost of a step and of a cut grows with depth and ranks: small widths, CPU ranks.

    python -m tests.benchmarks.growth [--layers 15 30 60] [--ranks 1 2 4]

Counts bytes sent and CPU seconds (of all threads) per rank, for a step with scoring and for a cut to 50 %. Wall time
depends on how many ranks share a core, so it is given up to 2 ranks only. Cost per layer should not depend on the
depth. The result goes to tests/benchmarks/results/growth.json and growth.png.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from loraprune_ds.config import ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.evaluate.drawing import BLUE, GREEN, ORANGE, PLOT_STYLE, VERMILION
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.ds_config import resolve_ds_config
from tests.benchmarks.running import RESULTS, make_parser, record
from tests.numerics.driver import Consecutive, assemble
from tests.oracle.models import make_tiny_llama
from tests.plan_cases import counted_bytes
from tests.ranks import RankPool

WIDTHS: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 16, "hidden": 128, "ffn": 352, "vocab": 512}
WARM, MEASURED, WINDOW, BATCH = 2, 2, 32, 4  # DeepSpeed records its fetch trace in the first steps
CUT_STEP = WARM + MEASURED
COLOURS = (BLUE, ORANGE, GREEN, VERMILION)
PANELS = (
    ("step", "bytes", "MB sent per step", 1e6),
    ("step", "cpu_seconds", "CPU seconds per step", 1),
    ("cut", "bytes", "MB sent per cut", 1e6),
    ("cut", "cpu_seconds", "CPU seconds per cut", 1),
)


# On each rank


def build(model: Path, world_size: int, cut_step: int = CUT_STEP) -> Trainer:
    config = RunConfig(
        output_dir="unused",
        model=ModelConfig(path=str(model)),
        prune=PruneConfig(ratio=0.5, channel_multiple=1, warmup_fraction=1 - 1 / cut_step, cooldown_fraction=0),
        train=TrainConfig(steps=cut_step, global_batch_size=BATCH, micro_batch_size=BATCH // world_size),
    )
    pretrained = open_pretrained(model)
    ds_config = resolve_ds_config(
        "ds_configs/zero3.json", pretrained.shape, world_size, config.train, config.model, config.lora.r
    )
    # No weight stays gathered from forward to backward, as in a model that does not fit. DeepSpeed's own limits are far
    # above these small widths.
    ds_config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    ids = torch.randint(pretrained.shape.vocab_size, (cut_step * BATCH, WINDOW))
    return assemble(config, pretrained, ds_config, Samples.of_windows(ids), Consecutive(BATCH), cut_step)


def measure(model: Path) -> dict[str, Any]:
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage twice per cut, over all imports: that does not grow
    torch.manual_seed(0)
    comm = Communicator()
    trainer = build(model, comm.world_size)
    for step in range(1, WARM + 1):
        trainer.step(step)

    def timed(act: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        comm.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        value = act()
        return value, {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}

    with counted_bytes(comm.world_size, comm.rank) as sent:
        _, step_row = timed(lambda: [trainer.step(step) for step in range(WARM + 1, CUT_STEP + 1)])
    step_row["bytes"] = sum(sent.values())
    before = trainer.model.comm.bytes_sent
    _, cut_row = timed(lambda: trainer.pruner.cut(CUT_STEP))
    return {
        "step": {key: value / MEASURED for key, value in step_row.items()},
        "cut": cut_row | {"bytes": trainer.model.comm.bytes_sent - before},
    }


# In the process that starts them


def summarise(layers: int, ranks: int, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: the rank that sent or computed the most."""
    row: dict[str, Any] = {"layers": layers, "ranks": ranks}
    for what in ("step", "cut"):
        row[what] = {key: max(rank[what][key] for rank in measured) for key in measured[0][what]}
        if ranks > 2:
            del row[what]["wall_seconds"]  # more ranks than cores
    return row


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = PLOT_STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 6.4), layout="constrained")
        for axes, (what, key, label, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
            for colour, ranks in zip(COLOURS, sorted({row["ranks"] for row in rows}), strict=False):
                points = [(row["layers"], row[what][key] / unit) for row in rows if row["ranks"] == ranks]
                axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"{ranks} rank{'s' * (ranks > 1)}")
            axes.set(title=f"{label}, of the busiest rank", xlabel="decoder layers")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted({row["layers"] for row in rows}))
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, dpi=110)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 30, 60])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="growth-") as name, closing(RankPool()) as pool:
        models = {
            count: make_tiny_llama(Path(name, str(count)), layers=count, seed=1, dtype="bfloat16", **WIDTHS)
            for count in arguments.layers
        }
        for ranks in arguments.ranks:
            for count, model in models.items():
                rows.append(summarise(count, ranks, pool.run(ranks, measure, model, timeout=3600)))
            record("growth", {"rows": rows, "widths": WIDTHS, "dtype": "bfloat16"})
            draw(rows, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
