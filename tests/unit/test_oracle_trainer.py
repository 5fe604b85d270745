"""The oracle's dense trainer is right: finite steps, planted groups, masking, Adam by hand."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.oracle import formula
from tests.oracle.dense_trainer import Batch, DenseTrainer, LayerCut, Settings
from tests.oracle.models import make_batches, make_lora, make_tiny_llama

Cuts = dict[int, list[LayerCut]]  # by step
VOCAB = 101
FP64 = Settings(lora_alpha=8, dtype=torch.float64)
# transformers computes norms, softmax and rotary angles in fp32 even in an fp64 model
FORWARD = 1e-5


@dataclass(frozen=True)
class Tiny:
    folder: Path
    lora: dict[str, Tensor]
    batches: list[Batch]

    def trainer(self, settings: Settings = FP64) -> DenseTrainer:
        return DenseTrainer(self.folder, self.lora, settings)


SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"heads": 4, "kv_heads": 4, "head_dim": 6, "hidden": 24, "ffn": 37},
    "gqa-biases": {
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 4,
        "hidden": 30,
        "ffn": 41,
        "biases": True,
    },
    "tied": {
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 8,
        "hidden": 20,
        "ffn": 23,
        "model_type": "mistral",
        "tie": True,
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_llama(folder, **SHAPES[request.param], layers=2, vocab=VOCAB, seed=1)
    batches = make_batches(steps=4, samples=6, tokens=12, vocab=VOCAB, seed=3)
    return Tiny(folder, make_lora(folder, r=4, seed=2), batches)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_loss_is_the_mean_over_the_supervised_tokens_of_the_global_batch(tiny: Tiny) -> None:
    ids, labels = tiny.batches[0]
    whole = tiny.trainer()
    logits = whole.logits(ids)
    per_sample = [
        F.cross_entropy(
            logits[sample, :-1][labels[sample, 1:] != -100],
            wanted[wanted != -100],
            reduction="none",
        )
        for sample, wanted in enumerate(labels[:, 1:])
    ]
    expected = float(torch.cat(per_sample).mean())
    mean_of_means = float(torch.stack([losses.mean() for losses in per_sample]).mean())
    assert abs(mean_of_means - expected) > 1e-3  # the batch is uneven enough to tell the two apart

    assert whole.loss((ids, labels)) == pytest.approx(expected, rel=1e-12)
    parts = tiny.trainer(replace(FP64, micro_batch_size=4))
    first, second = whole.step(tiny.batches[0], 1e-3), parts.step(tiny.batches[0], 1e-3)
    assert first.loss == pytest.approx(expected, rel=1e-12)
    assert second.loss == pytest.approx(expected, rel=FORWARD)
    for name, gradient in first.gradients.items():
        close(second.gradients[name], gradient, FORWARD)


def test_gradients_against_a_finite_step_of_the_loss(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    gradients = trainer.step(tiny.batches[0], 0.0).gradients
    # large, since parts of the forward pass are fp32; the five-point rule's own error is of its 4th power
    size = 1e-2
    for name, parameter in trainer.copies.items():
        position = torch.unravel_index(gradients[name].abs().argmax(), parameter.shape)
        start = parameter.data[position].clone()
        losses = {}
        for step in (-2, -1, 1, 2):
            parameter.data[position] = start + step * size
            losses[step] = trainer.loss(tiny.batches[0])
        parameter.data[position] = start
        slope = (8 * (losses[1] - losses[-1]) - (losses[2] - losses[-2])) / (12 * size)
        assert slope == pytest.approx(float(gradients[name][position]), rel=1e-4), name


def test_scores_come_from_weights_and_gradients_before_the_update(tiny: Tiny) -> None:
    trainer = tiny.trainer()
    masters, frozen = trainer.masters(), trainer.frozen()
    records = trainer.run(tiny.batches[:2], [1e-2, 1e-2])
    kv_heads = len(records[0].kept[0][0])
    for i in range(2):
        layer = {}
        for linear in {name.split(".lora_")[0].split(".", 2)[2] for name in masters}:
            a, b = f"layers.{i}.{linear}.lora_A", f"layers.{i}.{linear}.lora_B"
            weight, gradients = frozen[f"layers.{i}.{linear}.weight"], records[0].gradients
            layer[linear] = (weight, masters[a], masters[b], gradients[a], gradients[b])
        expected = formula.group_scores(
            layer, 8 / 4, kv_heads, trainer.queries_per_group, trainer.head_dim, True
        )
        for kind in range(2):
            first, second = records[0].scores[i][kind], records[1].scores[i][kind]
            close(first, expected[kind])
            close(records[0].averages[i][kind], 0.1 * first)
            close(records[1].averages[i][kind], 0.09 * first + 0.1 * second)
            assert not torch.allclose(first, second, rtol=1e-3)


def test_clipping_changes_the_update_and_not_the_scores(tiny: Tiny) -> None:
    free, clipped = tiny.trainer(), tiny.trainer(replace(FP64, max_grad_norm=1e-3))
    first, second = free.step(tiny.batches[0], 1e-3), clipped.step(tiny.batches[0], 1e-3)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in first.gradients.values()))
    for name, (average, _) in free.moments().items():
        close(second.gradients[name], first.gradients[name])
        # torch, as DeepSpeed, divides by the norm + 1e-6
        close(clipped.moments()[name][0], average * 1e-3 / (norm + 1e-6))
    for i in range(2):
        close(second.scores[i][0], first.scores[i][0])
        close(second.scores[i][1], first.scores[i][1])


def some_cut(trainer: DenseTrainer) -> list[LayerCut]:
    """Scattered groups, other ones in each layer, as explicit lists."""
    kept = enumerate(trainer.kept)
    return [
        ([h for h in heads if h != i + 1], [c for c in channels if c % 3 != i])
        for i, (heads, channels) in kept
    ]


def test_a_cut_equals_masking(tiny: Tiny) -> None:
    cut_model, masked = tiny.trainer(), tiny.trainer()
    cut = some_cut(cut_model)
    cut_model.run(tiny.batches[:1], [1e-2], {1: cut})
    masked.run(tiny.batches[:1], [1e-2])
    ids = tiny.batches[1][0]
    dense_logits = masked.logits(ids)

    query_width = masked.queries_per_group * masked.head_dim
    for i, (heads, channels) in enumerate(cut):
        assert isinstance(heads, list)
        assert isinstance(channels, list)
        for linear, kept, width in (
            ("self_attn.o_proj", heads, query_width),
            ("mlp.down_proj", channels, 1),
        ):
            module = masked.layers[i].get_submodule(linear)
            mask = torch.zeros(module.base_layer.weight.shape[1], dtype=torch.float64)  # type: ignore[union-attr]
            for group in kept:
                mask[group * width : (group + 1) * width] = 1
            module.base_layer.weight.data *= mask  # type: ignore[union-attr]
            masked.copies[f"layers.{i}.{linear}.lora_A"].data *= mask

    close(cut_model.logits(ids), masked.logits(ids), FORWARD)
    assert (dense_logits - masked.logits(ids)).abs().max() > 0.1
    assert sum(t.numel() for t in cut_model.frozen().values()) < sum(
        t.numel() for t in masked.frozen().values()
    )


def test_adam_goes_on_after_a_cut_with_its_own_moments(tiny: Tiny) -> None:
    """Two steps with a cut between them, done by hand from the recorded gradients."""
    settings = replace(FP64, beta1=0.8, beta2=0.95, epsilon=1e-6, weight_decay=0.1)
    trainer = tiny.trainer(settings)
    cut = some_cut(trainer)
    first, second = trainer.run(tiny.batches[:2], [1e-2, 3e-3], {1: cut})
    moments = trainer.moments()
    for name, final in trainer.masters().items():
        g1, g2, start = first.gradients[name], second.gradients[name], tiny.lora[name].double()
        m1, v1 = 0.2 * g1, 0.05 * g1**2
        w1 = start * (1 - 1e-2 * 0.1) - 1e-2 * (m1 / 0.2) / ((v1 / 0.05).sqrt() + 1e-6)
        m1, v1, w1 = (_kept_part(tensor, name, cut, trainer) for tensor in (m1, v1, w1))
        m2, v2 = 0.8 * m1 + 0.2 * g2, 0.95 * v1 + 0.05 * g2**2
        w2 = w1 * (1 - 3e-3 * 0.1) - 3e-3 * (m2 / (1 - 0.8**2)) / (
            (v2 / (1 - 0.95**2)).sqrt() + 1e-6
        )
        close(moments[name][0], m2)
        close(moments[name][1], v2)
        close(final, w2)
        close(trainer.copies[name].detach(), w2)


def _kept_part(tensor: Tensor, name: str, cut: list[LayerCut], trainer: DenseTrainer) -> Tensor:
    """What a cut leaves of a LoRA tensor, by boolean masks over reshaped groups."""
    _, layer, _, linear, factor = name.split(".")
    inner = linear in ("o_proj", "down_proj")
    if (factor == "lora_A") != inner:
        return tensor
    kept = cut[int(layer)][0 if linear[0] in "qkvo" else 1]
    width = {"q": trainer.queries_per_group, "o": trainer.queries_per_group}.get(
        linear[0], 1
    ) * trainer.head_dim
    grouped = (tensor.T if inner else tensor).unflatten(
        0, (-1, width if linear[0] in "qkvo" else 1)
    )
    mask = torch.tensor([group in kept for group in range(len(grouped))])  # type: ignore[operator]
    part = grouped[mask].flatten(0, 1)
    return part.T if inner else part


def test_counts_keep_the_highest_averages_and_indices_stay_those_of_the_original(
    tiny: Tiny,
) -> None:
    trainer = tiny.trainer()
    heads, channels = (len(kept) for kept in trainer.kept[0])
    cuts: Cuts = {
        1: [(heads, channels - 9), (heads - 1, channels - 5)],
        3: [(1, channels - 15)] * 2,
    }
    records = trainer.run(tiny.batches, [1e-2] * 4, cuts)
    assert [[(len(h), len(c)) for h, c in record.kept] for record in records] == [
        cuts[1],
        cuts[1],
        cuts[3],
        cuts[3],
    ]
    for before, after in ((None, records[0]), (records[1], records[2])):
        for i in range(2):
            for kind in range(2):
                old = before.kept[i][kind] if before else list(range((heads, channels)[kind]))
                average = dict(zip(old, after.averages[i][kind].tolist(), strict=True))
                kept = set(after.kept[i][kind])
                assert kept <= set(old)
                gone = [average[g] for g in old if g not in kept]
                assert not gone or max(gone) < min(average[g] for g in kept)
    for i in range(2):
        assert len(records[3].averages[i][1]) == channels - 15
        # the averages of what was kept went on, they did not start again
        position = records[2].kept[i][1][0]
        old = records[2].averages[i][1][records[1].kept[i][1].index(position)]
        close(records[3].averages[i][1][0], 0.9 * old + 0.1 * records[3].scores[i][1][0])

    again = tiny.trainer()
    by_list: Cuts = {step: [*records[step - 1].kept] for step in cuts}
    repeated = again.run(tiny.batches, [1e-2] * 4, by_list)
    assert [record.loss for record in repeated] == [record.loss for record in records]
    assert repeated[-1].kept == records[-1].kept


def test_bfloat16_trains_fp32_masters(tiny: Tiny) -> None:
    trainer = tiny.trainer(replace(FP64, dtype=torch.bfloat16))
    heads, channels = (len(kept) for kept in trainer.kept[0])
    records = trainer.run(tiny.batches, [1e-3] * 4, {2: [(heads - 1, channels - 3)] * 2})
    exact = tiny.trainer().run(tiny.batches, [1e-3] * 4, {2: [*records[1].kept]})
    assert {tensor.dtype for tensor in trainer.frozen().values()} == {torch.bfloat16}
    for name, master in trainer.masters().items():
        assert master.dtype == torch.float32
        assert torch.equal(trainer.copies[name].detach(), master.bfloat16())
        assert not torch.equal(master, master.bfloat16().float())
    for ours, reference in zip(records, exact, strict=True):
        # 8 bits of mantissa over two layers
        assert ours.loss == pytest.approx(reference.loss, rel=2e-2)
