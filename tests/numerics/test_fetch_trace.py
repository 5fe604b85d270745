"""ZeRO-3's record of the modules' order outlives a cut, and it is the one that a new recording would make."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from loraprune_ds.train.trainer import Trainer
from tests.numerics.cutting import recorded_collectives
from tests.numerics.driver import Job, build, write_adapter
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.ranks import RankPool


def record_of(trainer: Trainer) -> list[tuple[int, int]]:
    """Returns (parameter, position) of all that is prefetched, in order."""
    coordinator = trainer.model.zero_optimizer.parameter_offload.get_param_coordinator()
    assert coordinator.is_complete_trace()
    order = coordinator._PartitionedParameterCoordinator__param_order
    return [(use.param.ds_id, use.step_id_last_used_at) for use in order]


def gathers(trainer: Trainer, step: int) -> list[int]:
    """Makes a step. Returns the elements of its all-gathers before the reports, in order."""
    with recorded_collectives() as calls:
        trainer.step(step)
    return [numel for name, numel in calls if name == "all_gather_into_tensor"]


def train_on_a_kept_record(job: Job) -> dict[str, Any]:
    """Cuts after each of the first three steps, and has the order recorded anew after the fourth."""
    trainer, recordings = build(job), 0
    construct = PartitionedParameterCoordinator.construct_parameter_trace_from_module_trace

    def counting(self: Any) -> None:
        nonlocal recordings
        recordings += 1
        construct(self)

    cuts = 0
    with patch.object(PartitionedParameterCoordinator, "construct_parameter_trace_from_module_trace", counting):
        for step in (1, 2, 3):
            trainer.step(step)
            cuts += trainer.cut(step) is not None
        after_cut = gathers(trainer, 4)
        kept, while_kept = record_of(trainer), recordings
        trainer.model.forget_trace()
        trainer.step(5)
        fresh = gathers(trainer, 6)
    return {
        "cuts": cuts,
        "recordings": (while_kept, recordings),
        "same_record": kept == record_of(trainer),
        "same_gathers": after_cut == fresh,
    }


def test_a_cut_costs_no_new_recording(ranks: RankPool, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"heads": 6, "kv_heads": 3, "head_dim": 8, "hidden": 42, "ffn": 61}
    model = make_tiny_llama(tmp_path / "model", layers=4, vocab=97, seed=1, **sizes)
    adapter = write_adapter(tmp_path / "adapter", make_lora(model, r=4, seed=2), r=4, alpha=8)
    batches = make_batches(steps=6, samples=4, tokens=12, vocab=97, seed=3)
    prune = {"ratio": 0.3, "prune_every": 1, "warmup_fraction": 0.0, "cooldown_fraction": 0.5}
    for micro_batch_size in (1, 2):  # with one micro-batch the first cut comes before the record is complete
        job = Job(model, adapter, batches, prune, micro_batch_size=micro_batch_size)
        for result in ranks.run(2, train_on_a_kept_record, job):
            assert result == {"cuts": 3, "recordings": (1, 2), "same_record": True, "same_gathers": True}
