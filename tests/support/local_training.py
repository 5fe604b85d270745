"""Trains under `Pruning` in one process."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import optim
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds import PruneConfig, Pruning, linear_names
from loraprune_ds.report.records import StepRecord
from tests.oracle.models import make_batches
from tests.support.paper import PAPER

PRUNE = PruneConfig(**PAPER | {"ratio": 0.2, "prune_every": 2, "channel_multiple": 1})
STEPS = 5  # cuts after 2 and 4
Make = Callable[..., optim.Optimizer]
Rows = list[tuple[list[Any], list[Any]]]  # per step: scores, kept groups


def make_model(folder: Path, r: int = 4, whole: Sequence[str] = ()) -> Any:
    """Makes a model with LoRA. Its modules `whole` also train."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=r, target_modules=linear_names(base), init_lora_weights=False)
    config.modules_to_save = list(whole)
    return get_peft_model(base, config)


def train(
    model: Any,
    make: Make = optim.SGD,
    lr: float = 0.0,
    scale: float = 0.0,
    parts: int = 1,
    **at: Any,
) -> tuple[Rows, Any, list[StepRecord]]:
    """Trains on the same batches. At a rate of 0 only cuts change weights. `at`: settings of pruning, and more."""
    optimizer = make(trained := [p for p in model.parameters() if p.requires_grad], lr=lr)
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale > 0)
    known = {"scaler": scaler}
    if at.get("of_accelerate"):
        cast(Any, optimizer).scaler = known.pop("scaler")
    prune = replace(
        PRUNE,
        **{key: value for key, value in at.items() if key in PruneConfig.__dataclass_fields__},
    )
    pruning, rows = Pruning(model.train(), optimizer, prune, STEPS, **known), Rows()
    for step, (ids, _) in enumerate(
        make_batches(steps=STEPS, samples=4, tokens=8, vocab=97, seed=3), 1
    ):
        pruning.begin_step()
        share = math.inf if step == at.get("overflow") else 1 / parts
        for part in ids.chunk(parts):
            # its graph lives on during a cut
            loss = scaler.scale(model(input_ids=part, labels=part).loss * share)
            loss.backward()
        if at.get("clip"):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained, 1e-3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        pruning.end_step()
        scores = [x for layer in pruning.pruner.average.scores or [] for x in layer.values()]
        kept = [x.tolist() for layer in pruning.pruner.kept_of_dense for x in layer.values()]
        rows.append((scores, kept))
    pruning.close()
    if out := at.get("out"):
        pruning.save_model(
            out, AutoTokenizer.from_pretrained(model.get_base_model().config._name_or_path)
        )
    return rows, optimizer, pruning.recorder.history.steps


def train_and_save(
    model: Any, prune: PruneConfig, out: Path, make: Make = optim.AdamW, steps: int = 4
) -> Pruning:
    """Trains with two cuts. Saves the checkpoint of its last step, and the model as the live one has it."""
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruning = Pruning(model, optimizer, prune, steps)
    for ids, labels in make_batches(steps=steps, samples=4, tokens=8, vocab=97, seed=3):
        pruning.begin_step()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruning.end_step()
    assert len(pruning.cuts) == 2
    pruning.save(out / f"checkpoint-{steps}")
    pruning.save_model(out / "live")
    return pruning
