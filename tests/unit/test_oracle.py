"""The oracle must itself be right: hand-done numbers, autograd, and masks where it cuts."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.oracle
from tests.oracle import formula
from tests.oracle.dense_trainer import DenseTrainer, LayerCut, Settings
from tests.oracle.models import make_batches, make_lora, make_tiny_llama

# transformers computes norms, softmax and rotary angles in fp32 even in an fp64 model
FORWARD = 1e-5


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_oracle_imports_nothing_of_the_package() -> None:
    folder = Path(tests.oracle.__path__[0])
    imported = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")
    assert "torch" in imported
    assert not [name for name in imported if name.startswith("loraprune")]


def test_estimate_is_what_an_sgd_step_takes_away() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = ((7, 5), (3, 5), (7, 3), (5, 11))
    W, A, B, x = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    A.requires_grad_()
    B.requires_grad_()
    before = (B @ A).detach()
    ((W + 2 * B @ A) @ x).tanh().square().sum().backward()
    assert A.grad is not None
    assert B.grad is not None
    start, gradients = (A.detach().clone(), B.detach().clone()), (A.grad.clone(), B.grad.clone())
    torch.optim.SGD([A, B], lr=1.0).step()

    estimate = formula.gradient_estimate(*start, *gradients)

    close(estimate, before - (B @ A).detach())
    quadratic = gradients[1] @ gradients[0]
    close(estimate, gradients[1] @ start[0] + start[1] @ gradients[0] - quadratic)
    assert quadratic.norm() > 0.1 * estimate.norm()  # the term is no rounding error here


@pytest.mark.parametrize(("scaling", "expected"), [(2.0, 100.0), (0.0, 6.25)])
def test_element_importance_by_hand(scaling: float, expected: float) -> None:
    """G = 15 − 4.75·2.5 = 3.125, W + s·BA = 2 + 15·s; the sign of W must not matter to the sum."""
    W, A, B, gA, gB = (torch.tensor([[value]]) for value in (2.0, 3.0, 5.0, 0.5, 0.25))
    assert formula.element_importance(W, A, B, gA, gB, scaling).tolist() == [[expected]]
    assert formula.element_importance(-W, A, -B, -gA, gB, scaling).item() >= 0


def planted_layer() -> dict[str, formula.LoraLinear]:
    """2 kv groups of 2 heads, head_dim 3, hidden 5, 2 channels. Importance is |W|, per module another power of 10."""
    query = torch.tensor([1.0, -2.0, 3.0, 4.0]).repeat_interleave(3)  # per query head
    group = torch.tensor([1.0, -2.0]).repeat_interleave(3)
    channel = torch.tensor([3.0, 4.0])
    rows = {
        "self_attn.q_proj": query,
        "self_attn.k_proj": 1e3 * group,
        "self_attn.v_proj": 1e6 * group,
    }
    rows |= {"mlp.gate_proj": channel, "mlp.up_proj": -1e3 * channel}
    columns = {"self_attn.o_proj": 1e9 * query, "mlp.down_proj": 1e6 * channel}
    weights = {name: row[:, None].expand(-1, 5) for name, row in rows.items()}
    weights |= {name: column.expand(5, -1) for name, column in columns.items()}
    return {
        name: (
            W,
            torch.ones(1, W.shape[1]),
            torch.zeros(len(W), 1),
            torch.zeros(1, W.shape[1]),
            torch.ones(len(W), 1),
        )
        for name, W in weights.items()
    }


def test_group_scores_by_hand() -> None:
    heads, channels = formula.group_scores(planted_layer(), 2.0, 2, 2, 3, normalize=False)
    # q and o: heads 1 + 2 and 3 + 4, 15 elements each; k and v: 15 elements of one group
    assert heads.tolist() == [45 + 15e3 + 15e6 + 45e9, 105 + 30e3 + 30e6 + 105e9]
    assert channels.tolist() == [15 + 15e3 + 15e6, 20 + 20e3 + 20e6]


def test_group_scores_normalised_by_hand() -> None:
    layer = planted_layer()
    W, *rest = layer["self_attn.v_proj"]
    layer["self_attn.v_proj"] = (torch.zeros_like(W), *rest)  # type: ignore[assignment]  # no norm to divide by
    heads, channels = formula.group_scores(layer, 2.0, 2, 2, 3, normalize=True)
    expected = [2 * 3 / math.sqrt(58) + 1 / math.sqrt(5), 2 * 7 / math.sqrt(58) + 2 / math.sqrt(5)]
    close(heads, torch.tensor(expected, dtype=torch.float64))
    close(channels, torch.tensor([3 * 0.6, 3 * 0.8], dtype=torch.float64))


def test_moving_average_starts_from_zero() -> None:
    first = formula.moving_average(torch.zeros(1), torch.ones(1), 0.9)
    second = formula.moving_average(first, torch.full((1,), 3.0), 0.9)
    assert first.item() == pytest.approx(0.1)
    assert second.item() == pytest.approx(0.39)


def test_cubic_target() -> None:
    targets = [formula.cubic_target(step, 100, 0.4, 0.1, 0.1) for step in range(101)]
    assert [targets[step] for step in (0, 1, 10, 90, 95, 100)] == [0, 0, 0, 0.4, 0.4, 0.4]
    assert targets[50] == pytest.approx(0.4 * 7 / 8)
    assert targets[30] == pytest.approx(0.4 * (1 - 0.75**3))
    assert 0 < targets[11] < targets[12] < targets[89] < 0.4


def test_keep_best_breaks_ties_by_index() -> None:
    scores = torch.tensor([2.0, 5.0, 2.0, 2.0, 7.0])
    expected = [[4], [1, 4], [0, 1, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]
    assert [formula.keep_best(scores, n) for n in (1, 2, 3, 4, 5)] == expected
    assert [formula.cut_gap(scores, n) for n in (2, 3, 5)] == [pytest.approx(0.6), 0, math.inf]


# The dense trainer. The package's own trainer, which must agree with it, sees what else it does wrong.

BATCHES = make_batches(steps=2, samples=6, tokens=12, vocab=101, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"heads": 6, "kv_heads": 3, "head_dim": 4, "hidden": 30, "ffn": 41}
    path = tmp_path_factory.mktemp("tiny")
    return make_tiny_llama(path, **sizes, biases=True, layers=2, vocab=101, seed=1)


def make_trainer(folder: Path) -> DenseTrainer:
    lora = make_lora(folder, r=4, seed=2)
    return DenseTrainer(folder, lora, Settings(lora_alpha=8, dtype=torch.float64))


def test_scores_come_from_weights_and_gradients_before_the_update(folder: Path) -> None:
    trainer = make_trainer(folder)
    masters, frozen = trainer.masters(), trainer.frozen()
    records = trainer.run(BATCHES, [1e-2, 1e-2])
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


def some_cut(trainer: DenseTrainer) -> list[LayerCut]:
    """Scattered groups, other ones in each layer, as explicit lists."""
    kept = enumerate(trainer.kept)
    return [
        ([h for h in heads if h != i + 1], [c for c in channels if c % 3 != i])
        for i, (heads, channels) in kept
    ]


def test_a_cut_equals_masking(folder: Path) -> None:
    cut_model, masked = make_trainer(folder), make_trainer(folder)
    cut = some_cut(cut_model)
    cut_model.run(BATCHES[:1], [1e-2], {1: cut})
    masked.run(BATCHES[:1], [1e-2])
    ids = BATCHES[1][0]
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
