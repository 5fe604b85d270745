"""Says before the first step what will leave in which steps, and what will be written."""

from pathlib import Path

from loraprune_ds.checkpoint.layout import PRUNING_FOLDER
from loraprune_ds.config_types import Dtype
from loraprune_ds.model.frozen import DTYPES
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.units import aligned, format_bytes, format_count, format_percent


def describe(schedule: Schedule, dtype: Dtype, out: Path) -> list[str]:
    """Lays out a training whose folder is `out`."""
    dense = schedule.limits.dense
    counts = (dense.total_numel(), schedule.final_numel)
    weights = [format_bytes(count * DTYPES[dtype].itemsize) for count in counts]
    rows = [
        ["", "dense", "pruned"],
        ["parameters", *map(format_count, counts)],
        ["weights", *weights],
    ]
    note = "layers will differ, so stock tools need trust_remote_code; with ranking: uniform they do not"
    pruned = schedule.goal.final_shape
    if pruned is not None:
        note = "layers stay equal, so stock tools load the result"
        for kind in dense.kinds:
            sizes = (max(layer[kind] for layer in shape.counts) for shape in (dense, pruned))
            rows.append([kind, *map(str, sizes)])
    steps = ", ".join(map(str, schedule.cut_steps))
    return [
        f"{format_percent(schedule.goal.ratio)} of the layers' linears leave, "
        f"by cuts after steps {steps} of {schedule.steps}",
        *aligned(rows, "<>>"),
        note,
        f"{out} gets {PRUNING_FOLDER}/ in each checkpoint, and a report at the end",
    ]
