"""Trains LoRA with structured cuts in one process, without DeepSpeed. The sharded trainer must agree with it.

Shares no code with the package. Uses stock transformers, PEFT and torch.optim.AdamW. A cut is plain `index_select`.

    trainer = DenseTrainer(folder, lora, Settings(lora_alpha=16))
    records = trainer.run(batches, learning_rates, cuts={4: [(1, 20), (2, 17)]})
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests.oracle.formula import group_scores, keep_best, moving_average

# input_ids and labels (samples, tokens); -100 marks what is not supervised
Batch = tuple[Tensor, Tensor]
# What one layer keeps of (heads, channels). Either how many, by score, or which, as indices into the dense model.
LayerCut = tuple[int | list[int], int | list[int]]
Pair = tuple[Tensor, Tensor]  # one layer's scores: heads (kv heads,), channels (ffn,)

IGNORED = -100
HEAD_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CHANNEL_LINEARS = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
INPUT_SHRINKS = ("self_attn.o_proj", "mlp.down_proj")  # columns leave; of the other five, rows


@dataclass(frozen=True)
class Settings:
    lora_alpha: float
    dtype: torch.dtype = torch.float32
    micro_batch_size: int | None = None  # None: the whole global batch at once
    max_grad_norm: float = 0.0  # 0: no clipping
    epsilon: float = 1e-8
    normalize: bool = True
    moving_average: float = 0.9
    dropout: float = 0.0  # before LoRA, drawn anew from `seed`, step and micro-batch
    seed: int = 0


class Dropout(nn.Module):
    """Drops where a 16-bit number of a 64-bit draw is below p. Draws always, in evaluation mode too."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.threshold = int(p * 2**16)

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        numbers = drawn.view(torch.int16)[: x.numel()].view_as(x).int() + 2**15
        return torch.where(numbers < self.threshold, 0.0, x / (1 - self.threshold / 2**16))


@dataclass(frozen=True)
class StepRecord:
    """Holds one optimizer step. Scores and gradients have the widths before the step's cut."""

    step: int  # the first is 1
    loss: float
    gradients: dict[str, Tensor]  # of the global batch, unclipped, keyed like the LoRA tensors
    scores: list[Pair]  # of this step, per layer
    averages: list[Pair]  # moving average including this step: what a cut of this step ranks
    kept: list[tuple[list[int], list[int]]]  # after the step's cut, indices into the dense model


class DenseTrainer:
    """Trains one dense model. `lora`: "layers.{i}.{linear}.lora_A" (r, in) and ".lora_B" (out, r) at the start."""

    def __init__(self, folder: Path | str, lora: Mapping[str, Tensor], settings: Settings) -> None:
        self.settings = settings
        causal_lm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=settings.dtype, attn_implementation="eager"
        )
        self.layers: list[nn.Module] = list(causal_lm.model.layers)
        rank = lora["layers.0.self_attn.q_proj.lora_A"].shape[0]
        self.scaling = settings.lora_alpha / rank
        self.model = _with_lora(causal_lm, rank, settings.lora_alpha)
        if settings.dropout:
            for i, linear in (
                (i, x) for i in range(len(self.layers)) for x in HEAD_LINEARS + CHANNEL_LINEARS
            ):
                self._wrapper(i, linear).lora_dropout["default"] = Dropout(settings.dropout)

        config = causal_lm.config
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.queries_per_group: int = config.num_attention_heads // config.num_key_value_heads
        sizes = (config.num_key_value_heads, config.intermediate_size)
        self.kept = [([*range(sizes[0])], [*range(sizes[1])]) for _ in self.layers]
        heads, channels = (torch.zeros(size, dtype=torch.float64) for size in sizes)
        self.averages: list[Pair] = [(heads, channels) for _ in self.layers]

        self.copies = self._lora_parameters()
        assert set(lora) == set(self.copies), set(lora) ^ set(self.copies)
        self.master = {
            name: nn.Parameter(lora[name].to(settings.dtype, copy=True)) for name in self.copies
        }
        self.optimizer = torch.optim.AdamW(
            list(self.master.values()), eps=settings.epsilon, weight_decay=0.0
        )
        self.steps_done = 0
        self._copy_masters()

    # Training

    def run(
        self,
        batches: Sequence[Batch],
        learning_rates: Sequence[float],
        cuts: Mapping[int, Sequence[LayerCut]] | None = None,
    ) -> list[StepRecord]:
        """Takes one step per batch. `cuts[s]` is made right after the optimizer's s-th step (counted over all runs)."""
        pairs, cuts = zip(batches, learning_rates, strict=True), cuts or {}
        return [self.step(*pair, cuts.get(self.steps_done + 1)) for pair in pairs]

    def step(
        self, batch: Batch, learning_rate: float, cut: Sequence[LayerCut] | None = None
    ) -> StepRecord:
        """Gradient, scores, update, then the cut."""
        loss = self._accumulate_gradients(batch)
        gradients = {name: _gradient(master).clone() for name, master in self.master.items()}
        scores = [self._layer_scores(i, gradients) for i in range(len(self.layers))]
        pairs, lam = zip(self.averages, scores, strict=True), self.settings.moving_average
        averages = [
            (moving_average(a, c, lam), moving_average(b, d, lam)) for (a, b), (c, d) in pairs
        ]
        self.averages = list(averages)

        if self.settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(list(self.master.values()), self.settings.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.steps_done += 1
        self._copy_masters()
        if cut is not None:
            for i, layer_cut in zip(range(len(self.layers)), cut, strict=True):
                self._cut_layer(i, layer_cut)
        return StepRecord(self.steps_done, loss, gradients, scores, averages, list(self.kept))

    def loss(self, batch: Batch) -> float:
        """Mean cross-entropy over the supervised tokens of the whole batch."""
        with torch.no_grad():
            return sum(float(part) for part in self._partial_losses(batch))

    def _partial_losses(self, batch: Batch) -> Iterator[Tensor]:
        """Yields each micro-batch's share of the global batch's mean token loss."""
        input_ids, labels = batch
        supervised = int((labels[:, 1:] != IGNORED).sum())
        size = self.settings.micro_batch_size or len(input_ids)
        for m, (ids, targets) in enumerate(
            zip(input_ids.split(size), labels.split(size), strict=True)
        ):
            torch.manual_seed(_dropout_seed(self.settings.seed, self.steps_done + 1, m))
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            wanted = targets[:, 1:].flatten()
            yield (
                F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORED, reduction="sum")
                / supervised
            )

    def _accumulate_gradients(self, batch: Batch) -> float:
        """Adds the micro-batches' gradients up."""
        for master in self.master.values():
            master.grad = torch.zeros_like(master)
        total = 0.0
        for part in self._partial_losses(batch):
            part.backward()
            total += float(part.detach())
            for name, copy in self.copies.items():
                _gradient(self.master[name]).add_(_gradient(copy))
                copy.grad = None
        return total

    def _layer_scores(self, i: int, gradients: Mapping[str, Tensor]) -> Pair:
        tensors = {}
        for linear in HEAD_LINEARS + CHANNEL_LINEARS:
            a, b = f"layers.{i}.{linear}.lora_A", f"layers.{i}.{linear}.lora_B"
            weight = self._wrapper(i, linear).base_layer.weight.detach()
            masters = (self.master[a].detach(), self.master[b].detach())
            tensors[linear] = (weight, *masters, gradients[a], gradients[b])
        heads = {
            "num_key_value_heads": len(self.kept[i][0]),
            "queries_per_group": self.queries_per_group,
        }
        normalize = self.settings.normalize
        return group_scores(
            tensors, self.scaling, **heads, head_dim=self.head_dim, normalize=normalize
        )

    # The cut

    def _cut_layer(self, i: int, cut: LayerCut) -> None:
        heads, channels = (
            keep_best(average, wanted)
            if isinstance(wanted, int)
            else [kept.index(group) for group in sorted(wanted)]
            for average, wanted, kept in zip(self.averages[i], cut, self.kept[i], strict=True)
        )
        for linear in HEAD_LINEARS:
            per_group = (
                self.queries_per_group if linear in ("self_attn.q_proj", "self_attn.o_proj") else 1
            )
            self._cut_linear(i, linear, heads, per_group * self.head_dim)
        for linear in CHANNEL_LINEARS:
            self._cut_linear(i, linear, channels, 1)
        self.averages[i] = (self.averages[i][0][heads], self.averages[i][1][channels])
        old_heads, old_channels = self.kept[i]
        self.kept[i] = ([old_heads[j] for j in heads], [old_channels[j] for j in channels])

    def _cut_linear(self, i: int, linear: str, groups: list[int], width: int) -> None:
        index = torch.tensor([group * width + j for group in groups for j in range(width)])
        axis = 1 if linear in INPUT_SHRINKS else 0
        base = self._wrapper(i, linear).base_layer
        base.weight.data = base.weight.data.index_select(axis, index)
        if axis == 0 and base.bias is not None:
            base.bias.data = base.bias.data.index_select(0, index)

        name = f"layers.{i}.{linear}." + ("lora_A" if axis == 1 else "lora_B")
        master = self.master[name]
        state = self.optimizer.state[master]
        for holder in (self.copies[name], master):
            holder.data = holder.data.index_select(axis, index)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = state[moment].index_select(axis, index)

    # What there is to compare

    def masters(self) -> dict[str, Tensor]:
        return {name: master.detach().clone() for name, master in self.master.items()}

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(exp_avg, exp_avg_sq) of every LoRA tensor."""
        states = {name: self.optimizer.state[master] for name, master in self.master.items()}
        return {
            name: (state["exp_avg"].clone(), state["exp_avg_sq"].clone())
            for name, state in states.items()
        }

    def frozen(self) -> dict[str, Tensor]:
        """Returns everything that is not LoRA, a tied head once, without the leading "model." of the names."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if ".lora_" not in name:
                short = (
                    name.removeprefix("base_model.model.")
                    .removeprefix("model.")
                    .replace(".base_layer.", ".")
                )
                found[short] = parameter.detach().clone()
        return found

    def logits(self, input_ids: Tensor) -> Tensor:
        """Computes (samples, tokens, vocabulary) of the model as it is now, LoRA included."""
        with torch.no_grad():
            return self.model(input_ids=input_ids, use_cache=False).logits

    def _wrapper(self, i: int, linear: str) -> Any:
        """Returns PEFT's LoRA layer around one linear. Untyped, as nn.Module types its attributes Tensor | Module."""
        return self.layers[i].get_submodule(linear)

    def _lora_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"layers.{i}.{linear}.{factor}": getattr(self._wrapper(i, linear), factor)[
                "default"
            ].weight
            for i in range(len(self.layers))
            for linear in HEAD_LINEARS + CHANNEL_LINEARS
            for factor in ("lora_A", "lora_B")
        }

    def _copy_masters(self) -> None:
        for name, copy in self.copies.items():
            copy.data.copy_(self.master[name].data)


def _with_lora(model: Any, rank: int, alpha: float) -> nn.Module:
    targets = [linear.split(".")[1] for linear in HEAD_LINEARS + CHANNEL_LINEARS]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets)  # pyright: ignore[reportArgumentType]
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def _dropout_seed(seed: int, step: int, micro_batch: int) -> int:  # the first 63 bits of a digest
    return int(hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).hexdigest()[:16], 16) >> 1


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
