"""Whole layers that a run drops before its first step: which ones, on any number of ranks, a resume and an export."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraprune_ds.config import RunConfig
from loraprune_ds.export.formats import ExportSource, export
from loraprune_ds.model.tokenizer import Starts
from loraprune_ds.train.data.loading import load_samples
from loraprune_ds.train.data.samples import SampleOrder
from loraprune_ds.train.depth import SAMPLES
from tests.integration import resuming
from tests.integration.resuming import config_for, contents, losses, read_tensors, run_here, write_family, write_run
from tests.oracle.models import make_tiny_llama
from tests.ranks import RankPool

STEPS, STOP, LAYERS = 8, 5, 6
PRUNE = {"ratio": 0.45, "depth_ratio": 0.34, "prune_every": 3, "protected_last": 1}
TOLERANCE = 1e-5  # as in test_resume.py


@torch.no_grad()
def least_influential(config: RunConfig, count: int) -> tuple[list[int], float]:
    """Returns the layers that turn the hidden states least, from transformers' own record, and the loss of step 1.

    The last layer is protected. The teacher has all layers.
    """
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    tokenizer, dropped = AutoTokenizer.from_pretrained(config.model.path), list[int]()
    loaded = load_samples(config.data, tokenizer, minimum=1, vocab_size=model.config.vocab_size, starts=Starts())
    order = SampleOrder(loaded.epoch_length, config.train.global_batch_size, config.seed, loaded.epoch, None)
    batches = [order.batch(step) for step in range(-(-SAMPLES // config.train.global_batch_size))]
    ids = torch.cat([loaded.samples.inputs(batch)["input_ids"] for batch in batches])
    inputs = ids[: config.train.global_batch_size]
    before = model(inputs).logits[:, :-1].flatten(0, 1)
    for _ in range(count):
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        changes = [1 - cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]
        allowed = [i for i in range(1, LAYERS - 1) if i not in dropped]
        dropped.append(min(allowed, key=lambda i: float(changes[i])))
        model.model.layers[dropped[-1]].forward = lambda hidden, *args, **settings: hidden
    after, weight, t = model(inputs).logits[:, :-1].flatten(0, 1), config.train.distill_weight, 2.0
    pairs = (after / t).log_softmax(-1), (before / t).log_softmax(-1)
    own, taught = cross_entropy(after, inputs[:, 1:].flatten()), kl_div(*pairs, reduction="batchmean", log_target=True)
    return sorted(dropped), float((1 - weight) * own + weight * t**2 * taught)


def test_a_run_without_two_layers(ranks: RankPool, tmp_path: Path) -> None:
    path = write_run(tmp_path, prune=PRUNE, train={"steps": STEPS, "distill_weight": 0.5}, checkpoint={"every": None})
    make_tiny_llama(tmp_path / "deep", heads=8, kv_heads=4, hidden=64, ffn=93, layers=LAYERS)
    model = f"model.path={tmp_path / 'deep'}"
    straight, out = (config_for(path, tmp_path / name, model) for name in ("straight", "out"))
    ranks.run(2, run_here, straight)
    assert not any(ranks.run(1, run_here, out, None, STOP))
    resolved = config_for(tmp_path / "out" / "config.yaml", tmp_path / "out")
    assert all(ranks.run(3, run_here, resolved, "auto"))

    found, expected = contents(tmp_path / "out", STEPS), contents(tmp_path / "straight", STEPS)
    assert found.kept == expected.kept
    dropped, loss = least_influential(straight, 2)
    assert resolved.model.drop_layers == dropped
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "straight"), abs=TOLERANCE)
    assert losses(tmp_path / "out")[0] == pytest.approx(loss, rel=TOLERANCE)
    steps, cut = resuming.metrics(tmp_path / "out", "step"), resuming.metrics(tmp_path / "out", "cut")[-1]
    params = json.loads((tmp_path / "out" / "report.json").read_text())["params"]
    assert steps[0]["sparsity"] == pytest.approx(2 / LAYERS)
    assert cut["reached"] == pytest.approx(1 - params["linear_pruned"] / params["linear_dense"])
    assert cut["reached"] == pytest.approx(0.45, abs=0.02)
    kept = json.loads((tmp_path / "out" / "kept_groups.json").read_text())["layers"]
    groups = [[layer["heads"], layer["channels"]] for layer in kept]
    assert [i for i, layer in enumerate(groups) if layer == [[], []]] == dropped
    assert [layer for layer in groups if layer != [[], []]] == found.kept
    source = ExportSource("out", None, [tmp_path / "out" / "checkpoints" / f"step-{STEPS}"])
    export(source, "hf", tmp_path / "merged")
    resuming.assert_equal_tensors(read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "out" / "model"))
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"Layers: {LAYERS - 2} of {LAYERS}" in card
    pruned, info = cast(Any, AutoModelForCausalLM).from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True, trust_remote_code=True
    )
    assert not info["missing_keys"]
    assert len(pruned.model.layers) == LAYERS - 2


def test_a_run_without_any_layer_of_one_kind(ranks: RankPool, tmp_path: Path) -> None:
    """A Qwen3.5 has delta nets, and loses all its attention."""
    path = write_run(tmp_path, train={"steps": 3}, prune={"prune_every": 1, "ratio": 0.6}, checkpoint={"every": None})
    layers = {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    model = write_family(tmp_path, "qwen3_5_text", **layers)
    ranks.run(1, run_here, config_for(path, tmp_path / "out", model, "model.drop_layers=[1,3]", "deepspeed=null"))
    kept = json.loads((tmp_path / "out" / "kept_groups.json").read_text())["layers"]
    assert [[len(layer[kind]) > 0 for kind in ("heads", "delta", "channels")] for layer in kept] == [
        [False, True, True],
        [False, False, False],
    ] * 2
    assert [layer["heads_dense"] for layer in kept] == [0, 5, 0, 5]
