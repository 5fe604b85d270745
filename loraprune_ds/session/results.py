"""Writes the results of a training: report, kept groups and pictures."""

from pathlib import Path

from loraprune_ds.checkpoint.load import keep_from_lists
from loraprune_ds.checkpoint.state import State
from loraprune_ds.files import JsonObject
from loraprune_ds.pruning.schedule import Schedule
from loraprune_ds.ranks.comm import Communicator
from loraprune_ds.report import report
from loraprune_ds.report.records import Recorder


def write_results(
    folder: Path,
    state: State,
    schedule: Schedule,
    recorder: Recorder,
    config: JsonObject,
    comm: Communicator,
) -> None:
    """Writes the results of a training that ended with `state`, on rank 0, and shows their pictures. Collective.

    `config` goes into the report.
    """
    dense = schedule.limits.dense
    kept_of_dense = keep_from_lists(state.kept, dense.kinds)
    outcome = report.Outcome(
        config=config,
        history=recorder.history,
        schedule=schedule,
        pruned=dense.after(kept_of_dense),
        kept_of_dense=kept_of_dense,
        resumed_from=state.resumed_from,
        accelerator=state.accelerator,
        peak_bytes=state.peak_bytes,
    )
    comm.write_on_rank_0(
        folder, lambda: recorder.show_pictures(report.write_results(folder, outcome))
    )
