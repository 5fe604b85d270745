"""Measures what a step and a cut cost the host: CPU seconds, on models so narrow that arithmetic hardly counts.

    python -m tests.benchmarks.host_cost [--rounds 3]

The references are plain DeepSpeed with PEFT, without pruning, and the same network without ZeRO-3. On
two CPU ranks, the busier one counts:

* a step per decoder layer and micro-batch, forward and backward, as the difference of two depths
* the second step, in which DeepSpeed decides which weights to free, in plain steps
* a cut and the step after it, in plain steps

All of it is measured in some rounds by turns, and the least CPU seconds count. The result goes to
tests/benchmarks/results/host_cost.json.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import deepspeed
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from loraprune_ds.config import LoraConfig as Settings
from loraprune_ds.config import ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.train.data.samples import Samples
from loraprune_ds.train.trainer import Trainer
from loraprune_ds.zero.comm import Communicator
from loraprune_ds.zero.ds_config import resolve_ds_config
from tests.benchmarks.gpu_day.engine import SameBatch
from tests.benchmarks.running import make_parser, record
from tests.numerics.driver import Consecutive, assemble
from tests.oracle.models import make_tiny_llama
from tests.ranks import RankPool

WIDTHS: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 16, "hidden": 128, "ffn": 352, "vocab": 512}
RANKS, DEPTHS, WINDOW, BATCH = 2, (6, 18), 32, 4
CUT, LAST = 30, 37  # steps are scored up to the cut
RANK = 8  # of LoRA
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# On each rank


def build(model: Path, world_size: int, cut_step: int) -> Trainer:
    config = RunConfig(
        output_dir="unused",
        model=ModelConfig(path=str(model)),
        prune=PruneConfig(ratio=0.5, channel_multiple=1, warmup_fraction=1 - 1 / cut_step, cooldown_fraction=0),
        train=TrainConfig(steps=cut_step, global_batch_size=BATCH, micro_batch_size=BATCH // world_size),
    )
    pretrained = open_pretrained(model)
    ds_config = resolve_ds_config(
        "ds_configs/zero3.json", pretrained.shape, world_size, config.train, config.model, config.lora.r
    )
    # No weight stays gathered from forward to backward, as in a model that does not fit. DeepSpeed's own limits are far
    # above these small widths.
    ds_config["zero_optimization"]["stage3_max_reuse_distance"] = 0
    ids = torch.randint(pretrained.shape.vocab_size, (cut_step * BATCH, WINDOW))
    return assemble(config, pretrained, ds_config, Samples.of_windows(ids), Consecutive(BATCH), cut_step)


def cpu_seconds(comm: Communicator, action: Callable[[], object]) -> float:
    """Returns the CPU seconds of the busiest rank."""
    comm.barrier()
    began = time.process_time()
    action()
    return max(comm.gather_objects(time.process_time() - began))


def train(model: Path, comm: Communicator) -> dict[str, float]:
    """Trains with pruning: scored steps, a cut, steps that are not scored."""
    trainer = build(model, comm.world_size, CUT)
    trainer.order = SameBatch(BATCH)
    seconds, cut, score = [0.0], 0.0, trainer.pruner.score
    for step in range(1, LAST + 1):
        trainer.pruner.score = score if step in (CUT - 1, CUT) else lambda step: None  # type: ignore[method-assign]
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
    config = {"train_micro_batch_size_per_gpu": BATCH // comm.world_size, "zero_optimization": zero}
    config |= {"zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, target_modules=TARGETS, lora_dropout=0.0)
    wrapped = get_peft_model(base, lora, autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config, dist_init_required=False)
    ids = torch.randint(base.config.vocab_size, (BATCH // comm.world_size, WINDOW))

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    return timed(step, comm)


def train_alone(model: Path, comm: Communicator) -> dict[str, float]:
    """Trains the same model without ZeRO-3. A linear with LoRA is one operation, as in our trainer."""
    base = LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    wrapped = add_lora(base, open_pretrained(model).shape, Settings(r=RANK, lora_dropout=0.0), seed=0)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    ids = torch.randint(base.config.vocab_size, (BATCH // comm.world_size, WINDOW))

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, comm)


def timed(step: Callable[[], None], comm: Communicator) -> dict[str, float]:
    seconds = [0.0, *(cpu_seconds(comm, step) for _ in range(CUT))]
    return {"second": seconds[2], "plain": min(seconds[3:])}


RUNS = {"plain": train_plain, "alone": train_alone, "pruning": train}
ROWS = {"plain": "plain DeepSpeed and PEFT", "alone": "without ZeRO-3", "pruning": "after"}  # "before" was 53542b2


def measure(models: list[Path], run: str) -> dict[str, Any]:
    gc.freeze()
    comm = Communicator()
    return {"depths": [RUNS[run](model, comm) for model in models]}


# In the process that starts them


def least(rounds: list[Any]) -> Any:
    """Returns the least of each number over the rounds. What else the machine does can only add to it."""
    first = rounds[0]
    if isinstance(first, dict):
        return {key: least([found[key] for found in rounds]) for key in first}
    if isinstance(first, list):
        return [least(list(of_depth)) for of_depth in zip(*rounds, strict=True)]
    return min(rounds)


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """Returns CPU seconds, and the parts of a run in plain steps of the deeper model."""
    shallow, deep = found["depths"]
    row = {
        "per_layer_and_micro_batch": (deep["plain"] - shallow["plain"]) / (DEPTHS[1] - DEPTHS[0]),
        "plain_step": deep["plain"],
        "second_step": deep["second"],
        "second_over_plain": deep["second"] / deep["plain"],
    }
    if "cut" in deep:
        row |= {key: deep[key] for key in ("scored", "cut", "after_the_cut", "small")}
        row["cut_and_step_after_over_plain"] = (deep["cut"] + deep["after_the_cut"] - deep["small"]) / deep["plain"]
    return row


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        models = [make_tiny_llama(Path(name, str(depth)), layers=depth, seed=depth, **WIDTHS) for depth in DEPTHS]

        def measured(run: str) -> dict[str, Any]:
            with closing(RankPool()) as pool:  # new processes for each
                return pool.run(RANKS, measure, models, run, timeout=3600)[0]

        rounds = [{run: measured(run) for run in RUNS} for _ in range(arguments.rounds)]
    rows = {ROWS[run]: summarise(found) for run, found in least(rounds).items()}
    record("host_cost", {"rows": rows, "ranks": RANKS, "rounds": arguments.rounds, "depths": DEPTHS, "widths": WIDTHS})


if __name__ == "__main__":
    main()
