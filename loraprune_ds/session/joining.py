"""What a training under pruning begins with. A run knows it. The model of another loop is asked for it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from loraprune_ds.checkpoint.state import Origin
from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Dtype
from loraprune_ds.engine.live import LiveTraining
from loraprune_ds.engines import connect
from loraprune_ds.files import JsonObject
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.pruning.schedule import Schedule, make_schedule
from loraprune_ds.report import records
from loraprune_ds.session.checkpoint import PruningCheckpoint
from loraprune_ds.session.checks import check_model
from loraprune_ds.session.compiled import check_accelerate
from loraprune_ds.session.live import base_dtype, find_peft_model, live_shape
from loraprune_ds.session.origin import describe_origin, describe_settings
from loraprune_ds.session.quantised import adopt_quantised


@dataclass(frozen=True)
class Beginning:
    """What a training begins with.

    Attributes:
        dtype: of the frozen weights.
    """

    model: PrunableModel
    schedule: Schedule
    dtype: Dtype
    origin: Origin
    recorder: records.Recorder


def join(
    model: nn.Module,
    optimizer: Any,
    config: PruneConfig,
    steps: int,
    seed: int,
    checkpoint: PruningCheckpoint | None,
    ds_config: JsonObject | None,
    sinks: Sequence[records.Sink],
    scaler: Any,
) -> Beginning:
    """Checks the model of another loop, and connects with it. Arguments and errors are as in `Pruning`. Collective."""
    if checkpoint:
        checkpoint.check_schedule(steps, seed)
    check_accelerate()
    peft_model = find_peft_model(model)
    adopt_quantised(peft_model, refits=config.compensate != "none")
    check_model(peft_model)
    scaler = scaler or getattr(optimizer, "scaler", None)
    shape = live_shape(peft_model)
    live = connect(LiveTraining(model, peft_model, shape, optimizer, ds_config, scaler))
    if checkpoint:
        checkpoint.restore_trained(live)
    dense = checkpoint.dense if checkpoint else live.shape
    schedule = make_schedule(make_goal(config, dense), steps)
    dtype = base_dtype(peft_model, dense)
    if checkpoint:
        origin = checkpoint.state.origin
        settings = describe_settings(live, schedule, dtype) | origin.config
        origin = replace(origin, config=settings)
        history = checkpoint.history()
    else:
        origin = describe_origin(live, schedule, dtype, steps=steps, seed=seed)
        history = records.History()
    recorder = records.Recorder(history, sinks if live.rank == 0 else ())
    return Beginning(live, schedule, dtype, origin, recorder)
