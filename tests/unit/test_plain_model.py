"""The whole method in one process against the oracle, by `global`: tests/numerics has `uniform`, and the tolerances."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.config import PruneConfig
from loraprune_ds.config_types import Criterion
from loraprune_ds.local.model import LocalModel
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.oracle.dense_trainer import DenseTrainer, Settings
from tests.oracle.formula import cut_gap
from tests.oracle.models import make_batches, make_lora, make_tiny_llama
from tests.support.families import LLAMA_LINEARS
from tests.support.paper import PAPER
from tests.support.plain_training import Batch, PlainRun, fresh_lora
from tests.support.refusals import must_name

TOLERANCE = 1e-5
VOCAB, LAYERS, STEPS = 97, 3, 8
SIZES: dict[str, Any] = {"heads": 8, "kv_heads": 4, "head_dim": 4, "ffn": 41, "biases": True}
UNIFORM = PruneConfig(
    **PAPER | {"ratio": 0.3, "channel_multiple": 1, "prune_every": 2, "protected_first": 0}
)


@dataclass(frozen=True)
class Tiny:
    folder: Path
    lora: dict[str, Tensor]
    batches: list[Batch]

    def plain(self, prune: PruneConfig = UNIFORM, **settings: Any) -> PlainRun:
        return PlainRun(self.folder, self.lora, prune, STEPS, **settings)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = make_tiny_llama(
        tmp_path_factory.mktemp("tiny"), layers=LAYERS, vocab=VOCAB, seed=1, **SIZES
    )
    batches = make_batches(steps=STEPS, samples=6, tokens=12, vocab=VOCAB, seed=3)
    return Tiny(folder, make_lora(folder, r=4, seed=2), batches)


# The method against the oracle


def relative(found: Tensor, expected: Tensor) -> float:
    return float(((found - expected).abs() / expected.abs().clamp_min(1e-12)).max())


def test_global_with_squared_scores_equals_the_oracle(tiny: Tiny) -> None:
    """The oracle gets the number of groups that each cut keeps, but not which."""
    prune = replace(
        UNIFORM, ratio=0.4, prune_every=3, ranking="global", normalize="none", protected_last=0
    )
    run = tiny.plain(prune, micro_batch_size=2, max_grad_norm=0.5).run(tiny.batches)
    settings = Settings(
        lora_alpha=run.alpha, epsilon=run.epsilon, max_grad_norm=run.max_grad_norm, normalize=False
    )
    oracle = DenseTrainer(tiny.folder, tiny.lora, settings)
    counts = {
        cut.step: [(len(k["heads"]), len(k["channels"])) for k in cut.keep] for cut in run.cuts
    }
    records = oracle.run(tiny.batches, [run.learning_rate] * STEPS, counts)
    for step, record in enumerate(records, start=1):
        assert abs(run.losses[step - 1] - record.loss) < TOLERANCE
        if step <= run.cuts[-1].step:
            for found, expected in zip(run.averages[step - 1], record.averages, strict=True):
                assert max(relative(f, e) for f, e in zip(found, expected, strict=True)) < TOLERANCE
        for averages, wanted in zip(record.averages, counts.get(step, []), strict=step in counts):
            assert all(
                cut_gap(scores, count) > 10 * TOLERANCE
                for scores, count in zip(averages, wanted, strict=True)
            )
    assert run.kept() == oracle.kept
    tensors, moments = run.tensors(), run.moments()
    for name, expected in oracle.frozen().items():
        assert torch.equal(tensors[name], expected), name
    for name, expected in oracle.masters().items():
        assert (tensors[name] - expected).abs().max() < TOLERANCE, name
    for i in (0, 1):
        largest = max(pair[i].abs().max() for pair in oracle.moments().values())
        for name, pair in oracle.moments().items():
            assert (moments[name][i] - pair[i]).abs().max() < TOLERANCE * largest, name
    largest_group = max(
        run.pruner.limits.dense.group_numel[kind] for kind in run.prunable.shape.kinds
    )
    for cut in run.cuts:
        assert (
            abs(cut.reached - cut.target) <= largest_group / run.pruner.limits.dense.linear_numel()
        )
    assert run.cuts[-1].target == 0.4


def test_uniform_heads_for_the_schedules_end_and_reports_what_it_reached(tiny: Tiny) -> None:
    """Each cut is in proportion to the final counts: its own target alone would round to other ones."""
    run = tiny.plain().run(tiny.batches)
    limits, schedule = run.pruner.limits, run.pruner.schedule
    goal = schedule.goal
    on_the_way = [goal.counts_at(schedule.fraction(cut.step)) for cut in run.cuts]
    assert [cut.keep[0].counts for cut in run.cuts] == on_the_way
    assert on_the_way != [replace(goal, ratio=cut.target).equal_counts for cut in run.cuts]
    assert [cut.target for cut in run.cuts] == [schedule.target(cut.step) for cut in run.cuts]
    dense, tensors = limits.dense.linear_numel(), run.tensors()
    left = sum(
        tensors[f"layers.{i}.{linear.name}.weight"].numel()
        for i in range(LAYERS)
        for linear in LLAMA_LINEARS
    )
    assert run.cuts[-1].reached == run.pruner.reached() == 1 - left / dense
    assert run.cuts[-1].reached == pytest.approx(
        0.3, abs=2 * limits.dense.group_numel["channels"] / dense
    )


# The pruner's own promises


def test_no_cut_without_a_new_score_or_by_scores_that_are_all_zero(tiny: Tiny) -> None:
    run = tiny.plain()
    must_name("step 2 score", run.pruner.cut, 2)
    run.step(2, tiny.batches[0])
    assert len(run.cuts) == 1
    must_name("step 4 score", run.pruner.cut, 4)
    run.step(3, tiny.batches[1])
    for scores in (
        scores for layer in run.pruner.average.scores or () for scores in layer.values()
    ):
        scores.zero_()
    must_name("step 4 zero", run.pruner.cut, 4)


def test_a_step_that_overflowed_leaves_its_cut_to_the_next(tiny: Tiny) -> None:
    """As in fp16, when the loss scale is too high at the step of a cut."""
    run = tiny.plain()
    run.step(1, tiny.batches[0])
    first, *_, end = run.pruner.schedule.cut_steps
    assert run.pruner.cut(first, scored=False) is None
    run.pruner.average.updates_since_cut = 0  # nothing scored since the cut before the last one
    cut = run.pruner.cut(end, scored=False)
    assert cut is not None
    # these layers have few groups
    assert cut.reached == pytest.approx(run.pruner.schedule.goal.ratio, abs=0.05)


def test_scoring_stops_after_the_last_cut(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    lora_factors = LocalModel.lora_factors
    monkeypatch.setattr(
        LocalModel, "lora_factors", lambda *args: scored.append(step) or lora_factors(*args)
    )
    run = tiny.plain(replace(UNIFORM, cooldown_fraction=0.5))
    for step, batch in enumerate(tiny.batches, start=1):
        run.step(step, batch)
    assert run.cuts[-1].step == 4
    assert sorted(set(scored)) == [1, 2, 3, 4]


def test_random_pruning_draws_once(tiny: Tiny) -> None:
    first, again = (
        tiny.plain(replace(UNIFORM, criterion="random")).run(tiny.batches[:n] * 2) for n in (4, 4)
    )
    assert first.kept() == again.kept()
    assert first.averages[0][0][1].argsort().tolist() == first.averages[1][0][1].argsort().tolist()


# A LLaMA and the Phi-3 with its q, k, v and its gate, up fused have the same scores and lose the same groups

FUSED = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}


def fuse(llama: Path, folder: Path) -> Path:
    """Writes the LLaMA as a Phi-3 that computes the same."""
    shutil.copytree(llama, folder)
    config, tensors = (
        json.loads((llama / "config.json").read_text()),
        load_file(llama / "model.safetensors"),
    )
    for layer in range(config["num_hidden_layers"]):
        for name, parts in FUSED.items():
            block = f"model.layers.{layer}.{name.partition('.')[0]}"
            weights = [tensors.pop(f"{block}.{part}_proj.weight") for part in parts]
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.cat(weights)
    for name in ("attention_bias", "mlp_bias", "architectures"):
        config.pop(name, None)
    config |= {
        "model_type": "phi3",
        "original_max_position_embeddings": config["max_position_embeddings"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("criterion", ["lora", "magnitude"])
def test_fused_linears_score_as_their_parts(tmp_path: Path, criterion: Criterion) -> None:
    llama = tmp_path / "llama"  # head_dim is hidden_size / heads, as Phi-3 needs it
    make_tiny_llama(
        llama, heads=10, kv_heads=5, head_dim=6, hidden=60, ffn=23, layers=2, vocab=VOCAB, seed=1
    )
    batches = make_batches(steps=4, samples=6, tokens=16, vocab=VOCAB, seed=3)
    prune = replace(UNIFORM, criterion=criterion, ratio=0.4, protected_last=0)
    folders = (llama, fuse(llama, tmp_path / "phi3"))
    # the linears of a layer share one A
    loras = [fresh_lora(open_pretrained(folder).shape) for folder in folders]
    split, fused = (
        PlainRun(folder, lora, prune, 4, learning_rate=0.0, dtype=torch.float64).run(batches)
        for folder, lora in zip(folders, loras, strict=True)
    )
    assert len(split.cuts) >= 2
    assert fused.kept() == split.kept()
    for wanted, found in zip(split.averages[0], fused.averages[0], strict=True):
        for kind in (0, 1):
            # fp64, other kernels
            torch.testing.assert_close(found[kind], wanted[kind], rtol=1e-9, atol=0)
