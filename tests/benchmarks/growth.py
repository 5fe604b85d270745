"""Measures how the cost of a step and of a cut grows with depth and ranks: small widths, CPU ranks.

    python -m tests.benchmarks.growth [--layers 15 30 60] [--ranks 1 2 4]

Counts bytes sent and CPU seconds (of all threads) per rank. Both are given for a step with scoring and for a cut to 50
% of the linear parameters. CPU seconds do not depend on how many ranks share a core. Wall time does, so it is given up
to 2 ranks only.

Cost per layer should not depend on the depth. A rank's bytes per step come to (world_size - 1) / world_size of the
model at each gather. The result goes to tests/benchmarks/results/growth.json and, as a picture, growth.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from loraprune_ds.evaluate.drawing import PLOT_STYLE
from loraprune_ds.files import write_json
from loraprune_ds.report.provenance import hardware, versions
from tests.integration.launching import free_port
from tests.oracle.models import make_tiny_llama

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
WIDTHS: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 16, "hidden": 128, "ffn": 352, "vocab": 512}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00")  # Okabe & Ito
PANELS = (
    ("step", "bytes", "MB sent per step", 1e6),
    ("step", "cpu_seconds", "CPU seconds per step", 1),
    ("cut", "bytes", "MB sent per cut", 1e6),
    ("cut", "cpu_seconds", "CPU seconds per cut", 1),
)


def measure(ranks: int, models: list[Path], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Model -> what each rank measured."""
    result = folder / f"ranks-{ranks}.json"
    script = Path(__file__).with_name("growth_rank.py")
    command = [Path(sys.executable).with_name("deepspeed"), "--quiet", f"--master_port={free_port()}"]
    command += [f"--num_accelerators={ranks}", script, "--result", result, "--models", *models]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, cwd=ROOT, env=environment)
    return json.loads(result.read_text())


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
            axes.set_title(f"{label}, of the busiest rank")
            axes.set_xlabel("decoder layers")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_xticks(sorted({row["layers"] for row in rows}))
        figure.axes[0].legend(frameon=False)
        figure.savefig(path, dpi=110)


def show(rows: list[dict[str, Any]]) -> None:
    print("ranks layers | step: MB sent  CPU s  wall s | cut: MB sent  CPU s  wall s")
    for row in rows:
        cells = []
        for what in ("step", "cut"):
            found = row[what]
            wall = f"{found['wall_seconds']:7.2f}" if "wall_seconds" in found else "      -"
            cells.append(f"{found['bytes'] / 1e6:12.2f} {found['cpu_seconds']:7.2f} {wall}")
        print(f"{row['ranks']:5d} {row['layers']:6d} | {' | '.join(cells)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 30, 60])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="growth-") as name:
        folder = Path(name)
        models = [
            make_tiny_llama(folder / str(count), layers=count, seed=1, dtype="bfloat16", **WIDTHS)
            for count in arguments.layers
        ]
        for ranks in arguments.ranks:
            found = measure(ranks, models, folder)
            rows += [summarise(count, ranks, found[str(count)]) for count in arguments.layers]
            record(rows)
    show(rows)


def record(rows: list[dict[str, Any]]) -> None:
    """Writes the result after every number of ranks. An interrupted command keeps its rows."""
    facts = {"widths": WIDTHS, "dtype": "bfloat16", "versions": versions(), "hardware": hardware("cpu")}
    write_json(RESULTS / "growth.json", {"rows": rows, **facts})
    draw(rows, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
