"""The state of a foreign training that is pruned. Checkpoints, exports and reports are made from it."""

from dataclasses import dataclass, field

from peft import PeftModel

from loraprune_ds.config import Dtype
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.report.records import History
from loraprune_ds.zero.sharded import ShardedModel


@dataclass
class PrunedTraining:
    """Holds what is pruned and how far it is.

    Attributes:
        peft_model: as its owner knows it.
        model: the same, as ZeRO-3 has sharded it.
        pruner: scores, schedule and the groups that are left.
        dtype: of the frozen weights.
        steps: optimizer steps of the whole training.
        seed: of criterion `random`.
        step: optimizer steps made.
        history: records of all steps and cuts.
        resumed_from: steps at which the training was taken up again.
    """

    peft_model: PeftModel
    model: ShardedModel
    pruner: Pruner
    dtype: Dtype
    steps: int
    seed: int
    step: int = 0
    history: History = field(default_factory=History)
    resumed_from: list[int] = field(default_factory=list)
