"""What an evaluation wants to know of the folder of a run."""

from typing import Any


def read_run_report(report: dict[str, Any]) -> tuple[int, str]:
    """Parameters of the dense model, and the method as "criterion, ranking".

    Raises:
        KeyError, TypeError: it is not what a run writes.
    """
    prune = report["config"]["prune"]
    return int(report["params"]["dense"]), f"{prune['criterion']}, {prune['ranking']}"
