"""What ranks do on virtual cards: our own trainer, and another loop on DeepSpeed's engine."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import groups
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loraprune_ds import PruneConfig, Pruning
from loraprune_ds.zero.device import accelerator
from tests.streams.detector import Access
from tests.streams.virtual_card import watching
from tests.support.driver import Job, build, tiny_job
from tests.support.paper import FREE, PAPER

STEPS = 3  # the second one ends with a refit and a cut
PRUNE = PAPER | {"ratio": 0.4, "prune_every": 2, "warmup_fraction": 0.0, "cooldown_fraction": 0.0}
PRUNE |= FREE | {"compensate": "least_squares"}
# Sizes at which the layers of a tiny model are prefetched, freed and gathered again.
SMALL = {"stage3_prefetch_bucket_size": 15_000, "stage3_max_live_parameters": 60_000}
SMALL |= {"stage3_max_reuse_distance": 2_000}
PINNED = {"device": "cpu", "pin_memory": True}
KINDS: dict[str, dict[str, Any]] = {
    "overlap": {},
    "hpZ": {"zero_hpz_partition_size": 2},
    "offload": {"offload_optimizer": PINNED, "offload_param": PINNED},
}


def make_job(folder: Path, kind: str = "overlap") -> Job:
    """Writes a tiny model, and a kind of the shipped config with `overlap_comm`."""
    job = tiny_job(folder, PRUNE, steps=STEPS, samples=8, distill_weight=0.5)
    config = json.loads(Path("ds_configs/zero3_overlap.json").read_text())
    config["zero_optimization"] |= SMALL | KINDS[kind]
    path = folder / "deepspeed.json"
    path.write_text(json.dumps(config))
    return replace(job, deepspeed=str(path))


def watch(
    scenario: Callable[..., None], job: Job, without: Sequence[str] = ()
) -> set[tuple[Access, Access]]:
    """Returns what is reported of a scenario on this rank, without the waits of some functions."""
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's of an earlier engine
    with watching(without) as reports:
        scenario(job)
        gc.collect()
    return reports


def prune_alone(job: Job) -> None:
    """Prunes in our own trainer, with a teacher."""
    trainer, cuts = build(job), 0
    for step in range(1, STEPS + 1):
        trainer.step(step)
        cuts += trainer.cut(step) is not None
    assert cuts


def prune_outside(job: Job) -> None:
    """Prunes as the callback does, in a loop whose inputs never make the host wait."""
    base, lora = (
        AutoModelForCausalLM.from_pretrained(job.folder),
        LoraConfig(r=4, target_modules="all-linear"),
    )
    model = get_peft_model(base, lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    config = json.loads(Path(str(job.deepspeed)).read_text())
    config |= {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
    }
    # its clock waits for the card
    config |= {"gradient_clipping": 1.0, "timers": {"throughput": {"enabled": False}}}
    config["bf16"] = config["fp16"] = {"enabled": False}
    config["zero_optimization"]["reduce_bucket_size"] = 4_000
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()
    pruning = Pruning(engine, optimizer, PruneConfig(**job.prune), STEPS)
    for batch in job.batches:
        pruning.begin_step()
        for first in (0, 2):
            micro = (
                x[first : first + 2].pin_memory().to(engine.device, non_blocking=True)
                for x in batch
            )
            loss = engine(
                **dict(zip(("input_ids", "labels"), micro, strict=True)), use_cache=False
            ).loss
            engine.backward(loss)
            engine.step()
        del loss
        pruning.end_step()
    assert pruning.cuts


def prune_mended(job: Job) -> None:
    """Prunes on a DeepSpeed with the line that zero/README.md proposes."""
    reset = PartitionedParameterCoordinator.reset_step

    def reset_step(self: Any) -> None:
        reset(self)
        self._PartitionedParameterCoordinator__allgather_stream.wait_stream(
            accelerator().current_stream()
        )

    with patch.object(PartitionedParameterCoordinator, "reset_step", reset_step):
        prune_outside(job)
