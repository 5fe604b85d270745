"""Trains the same LLaMA of 30 M parameters under ZeRO-3 and under FSDP2, on two CPU ranks, over two cuts.

    python -m tests.benchmarks.sharded_engines [--rounds 3]

fp32, 4 x 128 tokens a rank, `fisher`, `uniform`, no refit. A round makes both trainings, one after the other, each in
processes of its own. CPU seconds are sums over the ranks, so other work on the machine hardly counts.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraprune_ds import PruneConfig, Pruning, linear_names
from loraprune_ds.config import RunConfig, TrainConfig
from loraprune_ds.engine.ds_config import resolve_ds_config
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.step import Pruner
from loraprune_ds.ranks.device import peak_bytes, reset_peak, resident_bytes
from tests.benchmarks.running import make_parser, record
from tests.support.ranks import RankPool

RANKS = 2
STEPS = 9
SAMPLES, WINDOW = 4, 128  # of a rank in a step
VOCABULARY = 4096
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": VOCABULARY,
}
CLIP = 0.1  # below all norms
SCHEDULE: dict[str, Any] = {"prune_every": 3, "warmup_fraction": 0.0, "cooldown_fraction": 0.34}
# cuts after steps 3 and 6
PRUNE = PruneConfig(ratio=0.3, ranking="uniform", compensate="none", **SCHEDULE)
Update = Callable[[Tensor], None]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES))
    base.save_pretrained(folder)
    lora = LoraConfig(r=8, target_modules=linear_names(base), task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(str(folder / "adapter"))
    runs: dict[str, list[Any]] = {engine: [] for engine in ENGINES}
    for i in range(rounds):
        for engine, of_engine in runs.items():
            pool = RankPool()
            of_engine.append(summary(pool.run(RANKS, train, engine, folder, timeout=1800)))
            pool.close()
            print(f"{i} {engine} done", flush=True)
    record("sharded_engines", {"rounds": runs, **comparison(*runs.values())})


def zero_3(model: Any, trained: list[Any], folder: Path) -> tuple[Any, Any, Update]:
    """Shards by DeepSpeed. Returns what computes, its optimizer, and what updates by a loss."""
    train = TrainConfig(
        steps=1, global_batch_size=RANKS * SAMPLES, micro_batch_size=SAMPLES, max_grad_norm=CLIP
    )
    config = resolve_ds_config(
        RunConfig("unused", train=train), open_pretrained(folder).shape, {}, RANKS, RANKS
    )
    config["bf16"]["enabled"] = False
    optimizer: Any = AdamW(trained, lr=1e-3)
    engine, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def update(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return engine, optimizer, update


def fsdp2(model: Any, trained: list[Any], folder: Path) -> tuple[Any, Any, Update]:
    """Shards by `fully_shard`, and returns the same."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=1e-3)

    def update(loss: Tensor) -> None:
        loss.backward()
        clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return model, optimizer, update


ENGINES = {"ZeRO-3": zero_3, "FSDP2": fsdp2}


def train(engine: str, folder: Path) -> dict[str, Any]:
    """Trains on this rank. Returns its losses, CPU seconds of steps and of cuts, and bytes."""
    at_first = resident_bytes()
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    computing, optimizer, update = ENGINES[engine](model, trained, folder)
    pruning = Pruning(computing, optimizer, PRUNE, STEPS)
    del base, trained
    gc.collect()
    reset_peak()
    found: dict[str, Any] = {"losses": [], "steps": [], "cuts": [], "sent": []}
    cut = Pruner.cut

    def timed_cut(*arguments: Any, **more: Any) -> Any:
        began = time.process_time()
        made = cut(*arguments, **more)
        if made is not None:
            found["cuts"].append(time.process_time() - began)
        return made

    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    with patch.object(Pruner, "cut", timed_cut):
        for _ in range(STEPS):
            ids = torch.randint(3, VOCABULARY, (SAMPLES, WINDOW), generator=generator)
            before = sum(found["cuts"])
            began = time.process_time()
            pruning.begin_step()
            loss = computing(input_ids=ids, labels=ids).loss
            update(loss)
            found["losses"].append(loss.item())
            del loss
            made = pruning.end_step(found["losses"][-1])
            seconds = time.process_time() - began
            found["steps"].append(seconds - (sum(found["cuts"]) - before))
            if made is not None:
                found["sent"].append(made.bytes_sent)
    kept = [x.tolist() for layer in pruning.pruner.kept_of_dense for x in layer.values()]
    found |= {"peak": peak_bytes(), "at_first": at_first, "kept": kept}
    pruning.close()
    return found


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the ranks of losses, sums of CPU seconds, and the largest peak."""
    losses, steps, cuts = (
        list(zip(*(rank[key] for rank in ranks), strict=True))
        for key in ("losses", "steps", "cuts")
    )
    seconds = list(map(sum, steps))
    return {
        "losses": list(map(statistics.mean, losses)),
        "step_before": statistics.median(seconds[1:3]),  # the first one warms up
        "step_after": statistics.median(seconds[6:]),
        "cuts": list(map(sum, cuts)),
        "sent": ranks[0]["sent"],
        "peak": max(rank["peak"] for rank in ranks),
        "imports": max(rank["at_first"] for rank in ranks),
        "kept": ranks[0]["kept"],
    }


def comparison(zero: list[dict[str, Any]], fsdp: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares the rounds in pairs, and takes the groups out of them."""
    same = all(a.pop("kept") == b.pop("kept") for a, b in zip(zero, fsdp, strict=True))
    losses = [zip(a["losses"], b["losses"], strict=True) for a, b in zip(zero, fsdp, strict=True)]
    ratios = {
        key: statistics.median(b[key] / a[key] for a, b in zip(zero, fsdp, strict=True))
        for key in ("step_before", "step_after", "peak")
    }
    cuts = [sum(b["cuts"]) / sum(a["cuts"]) for a, b in zip(zero, fsdp, strict=True)]
    return {
        "groups_equal": same,
        "largest_loss_difference": max(abs(x - y) / x for pairs in losses for x, y in pairs),
        "fsdp2_over_zero3": ratios | {"cuts": statistics.median(cuts)},
    }


if __name__ == "__main__":
    main()
