"""Chooses an engine: for a run by its config, for the training of another loop by what holds its weights."""

from peft import PeftModel
from torch import Tensor, nn

from loraprune_ds.engine.ds_config import Sections
from loraprune_ds.engine.live import LiveEngine, LiveTraining
from loraprune_ds.engine.training import Engine
from loraprune_ds.fsdp.live import LiveFsdp
from loraprune_ds.local.live import LiveLocal
from loraprune_ds.model import experts
from loraprune_ds.model.groups import Shape
from loraprune_ds.pruning.prunable_model import PrunableModel
from loraprune_ds.versions import is_new
from loraprune_ds.zero import shards
from loraprune_ds.zero.live import LiveZero3

LIVE: tuple[LiveEngine, ...] = (
    LiveZero3(),
    LiveFsdp(),
    LiveLocal(),
)  # the last takes what no other does


def run_engine(*, sharded: bool) -> Engine:
    """Returns the engine of a run: ZeRO-3, or one process, which needs no DeepSpeed."""
    if sharded:
        from loraprune_ds.zero.engine import Zero3

        return Zero3()
    from loraprune_ds.local.engine import Local

    return Local()


def deepspeed_sections() -> Sections:
    """Returns DeepSpeed's classes that check sections of its JSON. None without DeepSpeed, as for a plan."""
    if not is_new("deepspeed"):
        return {}
    from loraprune_ds.zero.sections import SECTIONS

    return SECTIONS


def connect(training: LiveTraining) -> PrunableModel:
    """Connects the pruner with a training. Collective. Raises UserError if the model cannot be cut."""
    return next(engine for engine in LIVE if engine.recognises(training)).connect(training)


def future_engine(model: PeftModel) -> LiveEngine:
    """Returns the engine that will train a model that has no optimizer yet."""
    return next(engine for engine in LIVE if engine.will_train(model))


def holder(parameter: Tensor) -> LiveEngine:
    """Returns the engine that holds a parameter, before or in a training."""
    return next(engine for engine in LIVE if engine.holds(parameter))


def is_sharded(parameter: Tensor) -> bool:
    """Returns whether this rank holds a part of a parameter."""
    return holder(parameter) is not LIVE[-1]


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """Returns the shape of a parameter over all ranks. Only ZeRO-3's parameters have another."""
    return shards.full_shape(parameter)


def join_rows(stacked: Tensor) -> tuple[Shape, nn.Parameter]:
    """Makes a frozen matrix of the weights of experts (experts, rows, columns). Returns their shape, too."""
    return (shards if shards.is_sharded(stacked) else experts).join_rows(stacked)
