"""The whole method in one process: the package's pruner and a plain-tensor model in a loop with torch's AdamW."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy

from loraprune_ds.config import LoraConfig, PruneConfig
from loraprune_ds.local.model import LocalModel
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.classes import causal_lm_class
from loraprune_ds.model.experts import stack_experts
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.pretrained import open_pretrained
from loraprune_ds.pruning.goal import make_goal
from loraprune_ds.pruning.schedule import make_schedule
from loraprune_ds.pruning.step import Cut, Pruner
from tests.support.family_cuts import reopened

Batch = tuple[Tensor, Tensor]


def fresh_lora(shape: ModelShape, r: int = 2) -> dict[str, Tensor]:
    """Draws A by the layer. B is zero, so LoRA adds nothing at first."""
    lora: dict[str, Tensor] = {}
    for i, linear in shape.linears():
        a, b = linear.lora_shapes(r)
        lora[f"layers.{i}.{linear.linear}.lora_A"] = torch.randn(
            a, generator=torch.Generator().manual_seed(i)
        )
        lora[f"layers.{i}.{linear.linear}.lora_B"] = torch.zeros(b)
    return lora


def in_peft(name: str) -> str:
    """Returns PEFT's name for one of the oracle's."""
    return f"base_model.model.{'model.' * name.startswith('layers.')}{name}"


def build_model(
    folder: Path, lora: dict[str, Tensor], *, alpha: float, dtype: torch.dtype
) -> PeftModel:
    """The saved model with the oracle's adapter ("layers.{i}.{linear}.lora_A") in place of a fresh one."""
    rank, source = next(iter(lora.values())).shape[0], open_pretrained(folder)
    if (shape := source.shape).family.has_encoder:
        base: Any = reopened(source)
        base.to(dtype)
    else:
        base = causal_lm_class(shape.model_type).from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
    stack_experts(base)
    model = add_lora(base, shape, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0), seed=0)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in lora.items():
            named[f"{in_peft(name)}.default.weight"].copy_(value)
    return model


@dataclass
class PlainRun:
    """Trains and prunes; records what can be compared with the oracle."""

    folder: Path
    lora: dict[str, Tensor]
    prune: PruneConfig
    steps: int
    alpha: float = 8
    learning_rate: float = 5e-3
    epsilon: float = 1e-3
    max_grad_norm: float = 0.0
    micro_batch_size: int = 3
    dtype: torch.dtype = torch.float32
    losses: list[float] = field(default_factory=list)
    averages: list[list[tuple[Tensor, ...]]] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = build_model(self.folder, self.lora, alpha=self.alpha, dtype=self.dtype)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trainable, lr=self.learning_rate, eps=self.epsilon, weight_decay=0.0
        )
        shape = open_pretrained(self.folder).shape
        self.prunable = LocalModel(self.model, shape, self.optimizer)
        self.plan = make_schedule(make_goal(self.prune, shape), self.steps)
        self.pruner = Pruner(cast(Any, self.prunable), self.plan, seed=0)

    def step(self, step: int, batch: Batch) -> None:
        with self.pruner.record_step(step):
            self.backward(batch)
            self.pruner.score(step)
        self.pruner.note_tokens(batch[0].numel())
        assert self.pruner.average.scores is not None
        self.averages.append(
            [tuple(s.clone() for s in layer.values()) for layer in self.pruner.average.scores]
        )
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.trainable, self.max_grad_norm)
        self.optimizer.step()
        if cut := self.pruner.cut(step):
            self.cuts.append(cut)

    def backward(self, batch: Batch) -> None:
        """The loss of the global batch, micro-batch by micro-batch."""
        self.optimizer.zero_grad()
        supervised, total = int((batch[1][:, 1:] != -100).sum()), 0.0
        size = 1 if self.prunable.shape.family.has_encoder else self.micro_batch_size
        for ids, targets in zip(*(t.split(size) for t in batch), strict=True):
            begin, inputs = 0, {"input_ids": ids}
            if self.prunable.shape.family.has_encoder:  # a sample of source and target
                begin = int((targets[0] != -100).nonzero()[0]) - 1
                inputs = {"input_ids": ids[:, :begin], "decoder_input_ids": ids[:, begin:]}
            with self.pruner.record_forward(None, None):
                predictions = self.model(**inputs).logits[:, :-1].flatten(0, 1)
            loss = (
                cross_entropy(predictions, targets[:, begin + 1 :].flatten(), reduction="sum")
                / supervised
            )
            loss.backward()
            total += loss.item()
        self.losses.append(total)

    def run(self, batches: Sequence[Batch]) -> "PlainRun":
        for step, batch in enumerate(batches, start=1):
            self.step(step, batch)
        return self

    def kept(self) -> list[tuple[list[int], ...]]:
        return [
            tuple(groups.tolist() for groups in keep.values()) for keep in self.pruner.kept_of_dense
        ]

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self._named()}

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        states = ((name, self.optimizer.state.get(parameter)) for name, parameter in self._named())
        return {name: (state["exp_avg"], state["exp_avg_sq"]) for name, state in states if state}

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        """Everything by the oracle's names: "layers.0.mlp.up_proj.lora_B", "layers.0.mlp.up_proj.weight", …"""
        for name, parameter in self.model.named_parameters():
            short = name.removeprefix("base_model.model.").removeprefix("model.")
            yield short.removesuffix(".default.weight").replace(".base_layer.", "."), parameter
