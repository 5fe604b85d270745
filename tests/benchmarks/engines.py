"""Measures what pruning adds to PEFT, without DeepSpeed and on one rank of ZeRO-3, in CPU seconds of one process.

    python -m tests.benchmarks.engines [--rounds 4]

All arms live in this process and make each step by turns, so other work on the machine slows all of them. `smol` is
SmolLM2-135M on 4 x 256 tokens in fp32: a step before a cut of 30 %, a step after it, and the cut. `narrow` has its 30
layers at width 72, on 8 tokens, so what remains is the host's work. Each arm is also given as a ratio to its partner.
"""

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from operator import truediv
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraprune_ds import PruneConfig, Pruning, linear_names
from loraprune_ds.config import RunConfig, TrainConfig
from loraprune_ds.engine.ds_config import resolve_ds_config
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pretrained.sources import embedded_model_dir
from loraprune_ds.pruning.step import Pruner
from tests.benchmarks.running import make_parser, record
from tests.support.driver import Job, build
from tests.support.ranks import start_deepspeed

Step = Callable[[int], object]  # makes a step, counted from 0
PEFT, ZERO, OWN = "PEFT", "ZeRO-3, PEFT", "ZeRO-3, our trainer, fisher"
# arm -> its partner, criterion, and whether ZeRO-3 holds the model
ARMS: dict[str, tuple[str | None, str | None, bool]] = {
    PEFT: (None, None, False),
    "plain, fisher": (PEFT, "fisher", False),
    "plain, lora": (PEFT, "lora", False),
    ZERO: (PEFT, None, True),
    "ZeRO-3, fisher": (ZERO, "fisher", True),
    OWN: (ZERO, "fisher", True),
}
AFTER = 2  # steps after the cut


@dataclass(frozen=True)
class Work:
    """A model, its adapter, and a batch for each step. The cut of 30 % is due before the last `after` steps."""

    folder: Path
    adapter: Path
    batches: list[Tensor]
    after: int
    multiple: int

    def prune(self, criterion: str) -> dict[str, Any]:
        end = {
            "warmup_fraction": 0.0,
            "cooldown_fraction": self.after / len(self.batches),
            "prune_every": 100,
        }
        return end | {
            "ratio": 0.3,
            "criterion": criterion,
            "compensate": "none",
            "channel_multiple": self.multiple,
        }


def prepare(
    folder: Path, batch: tuple[int, int], vocab: int, steps: int, after: int, multiple: int
) -> Work:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=linear_names(base), task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(adapter := tempfile.mkdtemp())
    torch.manual_seed(0)
    return Work(
        folder, Path(adapter), list(torch.randint(3, vocab, (steps, *batch))), after, multiple
    )


def peft_steps(work: Work, criterion: str | None, sharded: bool) -> Step:
    """Trains with transformers and PEFT in a plain loop."""
    base = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, work.adapter, is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = AdamW(trained, lr=1e-4)
    engine, size = None, len(work.batches[0])
    if sharded:
        train = TrainConfig(
            steps=1, global_batch_size=size, micro_batch_size=size, max_grad_norm=1.0
        )
        config = resolve_ds_config(
            RunConfig("unused", train=train), open_pretrained(work.folder).shape, {}, 1, 1
        )
        config["bf16"]["enabled"] = False
        engine, optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config
        )
    pruning = criterion and Pruning(
        engine or model, optimizer, PruneConfig(**work.prune(criterion)), len(work.batches)
    )

    def step(i: int) -> None:
        if pruning:
            pruning.begin_step()
        loss = (engine or model)(input_ids=work.batches[i], labels=work.batches[i]).loss
        if engine:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        value = loss.item()
        del loss
        if pruning:
            pruning.end_step(value)

    return step


def own_steps(work: Work) -> Step:
    """Trains with our trainer on one rank of ZeRO-3."""
    settings: dict[str, Any] = {
        "micro_batch_size": len(work.batches[0]),
        "max_grad_norm": 1.0,
        "lora_r": 8,
        "lora_alpha": 16,
    }
    batches = [(ids, ids) for ids in work.batches]
    trainer = build(Job(work.folder, work.adapter, batches, work.prune("fisher"), **settings))
    return lambda i: (trainer.step(i + 1), trainer.cut(i + 1))


def measure(work: Work, names: list[str], warm: int) -> dict[str, Any]:
    """Returns CPU seconds of each arm's steps before and after the cut, of the cut, and ratios to its partner."""
    cut, cuts = Pruner.cut, list[float]()

    def timed_cut(pruner: Pruner, step: int, **more: Any) -> Any:
        began = time.process_time()
        if (made := cut(pruner, step, **more)) is not None:
            cuts.append(time.process_time() - began)
        return made

    arms = {
        name: own_steps(work) if name == OWN else peft_steps(work, *ARMS[name][1:])
        for name in names
    }
    found: dict[str, Any] = {name: {"before": [], "after": []} for name in names}
    gc.freeze()
    cut_at = len(work.batches) - work.after
    with patch.object(Pruner, "cut", timed_cut):
        for i, (name, step) in product(
            range(len(work.batches) if work.after else cut_at - 1), arms.items()
        ):
            cuts.clear()
            began = time.process_time()
            step(i)
            seconds = time.process_time() - began - sum(cuts)
            found[name] |= {"cut": cuts[0]} if cuts else {}
            if i >= warm:
                found[name]["before" if i < cut_at else "after"].append(seconds)
            print(f"{i} {name}: {seconds:.3f} s", flush=True)
    for name, times in found.items():
        before, its = times["before"], found.get(ARMS[name][0] or name, times)["before"]
        times |= {
            f"median_{when}": statistics.median(times[when])
            for when in ("before", "after")
            if times[when]
        }
        times["over_partner"] = statistics.median(map(truediv, before, its))  # in pairs
        times |= {"least_before": min(before), "least_over_partner": min(before) / min(its)}
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--rounds", type=int, default=4, help="measured steps of SmolLM2 before the cut"
    )
    parser.add_argument(
        "--machine", default="", help="what else computed meanwhile, for the result"
    )
    rounds, machine = (arguments := parser.parse_args()).rounds, arguments.machine
    start_deepspeed(0, 1, Path(tempfile.mkdtemp()))
    sizes: dict[str, Any] = {
        "hidden_size": 72,
        "intermediate_size": 192,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(
        vocab_size=128, num_hidden_layers=30, head_dim=8, tie_word_embeddings=True, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(narrow := Path(tempfile.mkdtemp()))
    names = list(ARMS)
    result: dict[str, Any] = {"machine": machine, "load_average": os.getloadavg()[0]}
    result["partners"] = {name: partner for name, (partner, *_) in ARMS.items()}
    result["narrow"] = measure(prepare(narrow, (1, 8), 128, 10 * rounds + 6, 0, 1), names, 5)
    names.remove("plain, lora")
    result["smol"] = measure(
        prepare(embedded_model_dir(), (4, 256), 49152, 1 + rounds + AFTER, AFTER, 64), names, 1
    )
    record("engines", result)


if __name__ == "__main__":
    main()
