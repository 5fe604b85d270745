"""Runs on each rank of `host_cost.py`. It uses only what the checkouts before and after have in common."""

import argparse
import gc
import inspect
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.cut import Item, reshard
from loraprune_ds.zero.engine import quiet_deepspeed, start_ranks, stop_ranks
from loraprune_ds.zero.flat import AxisCut, ReshardPlan, partition_numel
from tests.benchmarks import growth_rank

CUT, LAST = 30, 37  # steps are scored up to the cut
HIDDEN, HEADS, HEAD_DIM, FFN, LAYERS, RANK = 8192, 64, 128, 22016, 80, 8  # LLaMA-65B
SHARES_PLANS = "plan" in inspect.signature(Item).parameters  # not before
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class SameBatch:
    def batch(self, step: int) -> torch.Tensor:
        return torch.arange(growth_rank.BATCH)


def cpu_seconds(comm: Communicator, action: Callable[[], object]) -> float:
    """Returns the CPU seconds of the busiest rank."""
    comm.barrier()
    began = time.process_time()
    action()
    return max(comm.gather_objects(time.process_time() - began))


def train(model: Path, comm: Communicator) -> dict[str, float]:
    """Trains with pruning: scored steps, a cut, steps that are not scored."""
    growth_rank.CUT_STEP = CUT
    trainer = growth_rank.build(model, comm)
    trainer.order = SameBatch()
    seconds, cut = [0.0], 0.0
    name = "score" if hasattr(trainer.pruner, "score") else "observe"  # before
    score = getattr(trainer.pruner, name)
    for step in range(1, LAST + 1):
        setattr(trainer.pruner, name, score if step in (CUT - 1, CUT) else lambda step: None)
        seconds.append(cpu_seconds(comm, lambda step=step: trainer.step(step)))
        if step == CUT:
            cut = cpu_seconds(comm, lambda: trainer.pruner.cut(CUT))
    return {
        "second": seconds[2],
        "plain": min(seconds[3 : CUT - 1]),
        "scored": seconds[CUT - 1],
        "cut": cut,
        "after_the_cut": seconds[CUT + 1],
        "small": min(seconds[CUT + 2 :]),
    }


def train_plain(model: Path, comm: Communicator) -> dict[str, float]:
    """Trains the same model with DeepSpeed and PEFT alone."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": growth_rank.BATCH // comm.world_size, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, target_modules=TARGETS, lora_dropout=0.0)
    wrapped = get_peft_model(base, lora, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
    ids = torch.randint(base.config.vocab_size, (growth_rank.BATCH // comm.world_size, growth_rank.WINDOW))

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return timed(step, comm)


def train_alone(model: Path, comm: Communicator) -> dict[str, float]:
    """Trains the same model without ZeRO-3. A linear with LoRA is one operation, as in our trainer."""
    from loraprune_ds.config import LoraConfig as Settings
    from loraprune_ds.model.adapters import add_lora
    from loraprune_ds.model.pretrained import open_pretrained  # the checkout before has it elsewhere

    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    wrapped = add_lora(base, open_pretrained(model).shape, Settings(r=RANK, lora_dropout=0.0), seed=0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    ids = torch.randint(base.config.vocab_size, (growth_rank.BATCH // comm.world_size, growth_rank.WINDOW))

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, comm)


def timed(step: Callable[[], None], comm: Communicator) -> dict[str, float]:
    seconds = [0.0, *(cpu_seconds(comm, step) for _ in range(CUT))]
    return {"second": seconds[2], "plain": min(seconds[3:])}


RUNS = {"pruning": train, "plain": train_plain, "alone": train_alone}


def exchange(world_size: int, device: str) -> float:
    """Returns the CPU seconds of all layers of LLaMA-65B on rank 1 of so many. A quarter of each goes.

    One layer is timed. Its all-to-alls deliver nothing. On `cpu` most of it is the copying, which a GPU does. On `meta`
    nothing is copied, but torch finds the shapes of the results in Python.
    """
    comm: Any = SimpleNamespace(world_size=world_size, rank=1)
    comm.all_to_all = lambda outgoing, send, receive: outgoing.new_empty(sum(receive))
    generator = torch.Generator().manual_seed(0)
    heads = torch.randperm(HEADS, generator=generator)[: HEADS * 3 // 4].sort().values
    rows = (heads[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()
    channels = torch.randperm(FFN, generator=generator)[: FFN * 3 // 4].sort().values
    tensors: list[tuple[tuple[int, int], int, torch.Tensor]] = []
    for width, keep, axes in ((HEADS * HEAD_DIM, rows, (0, 0, 0, 1)), (FFN, channels, (0, 0, 1))):
        for axis in axes:
            for other in (HIDDEN, RANK, RANK, RANK, RANK):  # the weight, and LoRA's copy, master and moments
                tensors.append(((width, other) if axis == 0 else (other, width), axis, keep))

    def layer() -> None:
        plans: dict[Any, ReshardPlan] = {}
        weights, states = [], []
        for i, (shape, axis, keep) in enumerate(tensors):
            is_state = i % 5 > 1
            dtype = torch.float32 if is_state else torch.bfloat16
            numel = partition_numel(shape[0] * shape[1], world_size)
            shard = torch.empty(numel, dtype=dtype, device=device)
            given: Any = AxisCut(shape, axis, keep)
            if SHARES_PLANS:
                given = plans.setdefault((shape, axis), plans.get((shape, axis)) or ReshardPlan(given, world_size, 1))
            (states if is_state else weights).append(Item(shard, given))
        reshard(states, comm)
        reshard(weights, comm)

    layer()
    began = time.process_time()
    layer()
    return LAYERS * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--run", choices=RUNS, default="pruning")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    quiet_deepspeed()
    comm = start_ranks()
    gc.freeze()
    found: dict[str, Any] = {"depths": [RUNS[arguments.run](model, comm) for model in arguments.models]}
    if comm.rank == 0:
        if arguments.run == "pruning":
            for device in ("cpu", "meta") if SHARES_PLANS else ("cpu",):  # before, it needed the values of masks
                found[f"exchange_on_{device}"] = {ranks: exchange(ranks, device) for ranks in (8, 64, 512)}
        arguments.result.write_text(json.dumps(found))
    stop_ranks()


if __name__ == "__main__":
    main()
