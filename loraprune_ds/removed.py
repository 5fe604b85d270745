"""Settings and options of earlier versions: what to do in place of each."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RemovedKey:
    """A setting of earlier commits. Files of runs and callbacks have it, which must stay readable.

    Attributes:
        default: with this value a training goes on unchanged.
        advice: what to do instead.
        last_reader: the last commit that reads another value. Empty: any value is left out.
    """

    default: Any
    advice: str
    last_reader: str = ""


DROP_BEFORE = "drop layers before the run, as launch/examples/drop_layers.py does"
REPEATED = (
    "remove it: a refit now repeats the last passes, with ten tokens for each input of a linear"
)
KEYS = {
    "model.drop_layers": RemovedKey([], DROP_BEFORE, "6ec3512a"),
    "prune.depth_ratio": RemovedKey(0.0, DROP_BEFORE, "6ec3512a"),
    "prune.sizes": RemovedKey(
        None, "a second run from the export of a first makes the next size", "886e65a4"
    ),
    "prune.compensate_steps": RemovedKey(4, REPEATED),
    "prune.compensate_decay": RemovedKey(0.9, REPEATED),
}
OPTIONS = {
    "--mtp": "results have no layers that predict further tokens",
    "--speed": "tests/benchmarks/serving.py measures the speed in servers",
    "--server-memory": "--set prune.target=12GiB finds the ratio for a server's memory",
    **dict.fromkeys(
        ("--intra-bandwidth", "--inter-bandwidth", "--host-bandwidth", "--flops", "--utilisation"),
        "a plan no longer estimates seconds, which no GPU has measured",
    ),
}
