"""Checks the arithmetic of the planner, without ranks."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loraprune_ds.config import DataConfig, LoraConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.adapters import add_lora
from loraprune_ds.model.flops import saved_by_layer
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.model.storage import FrozenStorage
from loraprune_ds.plan.cluster import GIB, Cluster
from loraprune_ds.plan.plan import (
    Plan,
    largest_micro_batch,
    make_plan,
    notes,
    plan_json,
    plan_table,
    search,
    suggestions,
)
from loraprune_ds.plan.request import Request, build_request, changed
from loraprune_ds.plan.stages import Stage, gathered_weights, logits, split_state
from tests.families import tiny_config, tiny_model
from tests.family_cuts import in_memory
from tests.paper import PAPER
from tests.published import sizes_of
from tests.refusals import refuses

SOURCE = sizes_of("llama", 512, 1376, 6, 8, num_key_value_heads=4, vocab_size=1000)
SMALL = shape_from_config(SOURCE, "somewhere")
WEIGHTS = SMALL.total_numel() * 2


def request(cluster: Cluster, *, steps: int | None = 20, shape: ModelShape = SMALL, **train: Any) -> Request:
    settings: dict[str, Any] = {"steps": steps, "global_batch_size": 64, "distill_weight": 0} | train
    config = RunConfig(
        output_dir="unused",
        data=DataConfig(window=64),
        prune=PruneConfig(**PAPER, ratio=0.5, channel_multiple=1, prune_every=5),
        train=TrainConfig(**settings),
    )
    return build_request("small", SOURCE, shape, config, cluster)


def tight(gpus: int, megabytes: float) -> Cluster:
    """GPUs that have so much memory for the run."""
    return Cluster(1, gpus, gpu_memory=3 + megabytes * 1e6 / GIB, nccl=0)


def stage(plan: Plan, name: str) -> Stage:
    return next(stage for stage in plan.stages if stage.name == name)


def test_host_memory_can_be_what_does_not_fit() -> None:
    plan = make_plan(request(Cluster(1, 8, host_memory=8)))
    assert plan.device_bytes <= plan.request.cluster.gpu_bytes
    assert not plan.fits


def test_offload_moves_bytes_from_the_gpu_to_the_host() -> None:
    plain = request(Cluster(1, 2))
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = changed(plain, deepspeed=away)
    dense, host = make_plan(plain).stages[0], make_plan(offloaded).stages[0]
    moved = ("weights", "lora", "lora_masters", "lora_moments", "lora_gradients")
    assert not set(moved) & set(host.state)
    assert {term: host.host[term] for term in moved} == {term: dense.state[term] for term in moved}
    assert make_plan(offloaded).step.host_copies > 0


def test_pinned_blocks_are_rounded_up_to_powers_of_two() -> None:
    def host(pinned: bool, shape: ModelShape = SMALL) -> dict[str, int]:
        both = {f"offload_{what}": {"device": "cpu", "pin_memory": pinned} for what in ("param", "optimizer")}
        return make_plan(changed(request(Cluster(1, 2), shape=shape), deepspeed=both)).stages[0].host

    plain, pinned = host(pinned=False), host(pinned=True)
    # Pieces of the channels' linears have 512 * 1376 elements, those of embedding and head 512 * 1000, half of each on
    # a rank, in bf16: 688 and 500 KiB. All others are powers of two.
    frozen = (6 * 3 * (1024 - 688) + 2 * (512 - 500)) * 1024
    lora, gradients = (1 << (n - 1).bit_length() for n in (plain["lora"], plain["lora_gradients"]))
    rounding = frozen + lora - plain["lora"] + 2 * (gradients - plain["lora_gradients"])
    assert pinned == plain | {"pinned_rounding": rounding}
    assert plain["lora_gradients_for_the_step"] == plain["lora_gradients"]


def test_eager_attention_computes_whole_windows_and_holds_more() -> None:
    plain = request(Cluster(1, 2))
    eager, sdpa = make_plan(changed(plain, model={"attn_implementation": "eager"})), make_plan(plain)
    for phase in ("training", "evaluation"):
        assert eager.stages[0].phases[phase]["activations"] > sdpa.stages[0].phases[phase]["activations"]
    assert eager.step.compute > sdpa.step.compute


def test_a_delta_net_keeps_the_chunks_of_its_rule() -> None:
    """Of each value head in fp32: some matrices of chunk by chunk. Attention keeps no square."""
    source = tiny_config("qwen3_5_text", num_hidden_layers=2).to_dict()
    shape, chunk = shape_from_config(source, "tiny"), 64
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "storage": FrozenStorage()}
    size = partial(saved_by_layer, source, shape, lora=LoraConfig(lora_dropout=0.0), eager=False, **settings)
    delta, attention = (size(index=i, tokens=(1, 16 * chunk)) for i in range(2))
    assert delta > 4 * 10 * 16 * chunk * chunk * 4 > attention
    assert delta < 2.1 * size(index=0, tokens=(1, 8 * chunk))


@pytest.mark.parametrize(("family", "kind"), [("lfm2", "conv"), ("granitemoehybrid", "linear_attention")])
def test_one_more_convolution_or_mamba_keeps_as_planned_on_a_cpu(family: str, kind: str) -> None:
    types = ([kind] * count + ["full_attention"] for count in (2, 3))
    (less, _), (more, planned) = (kept_on_a_cpu(family, num_hidden_layers=len(x), layer_types=x) for x in types)
    assert more - less == planned


@pytest.mark.parametrize("depth", ["num_layers", "num_decoder_layers"])
def test_one_more_layer_of_an_encoder_or_decoder_keeps_as_planned_on_a_cpu(depth: str) -> None:
    layers = {"num_layers": 2, "num_hidden_layers": 2, "num_decoder_layers": 2}
    at = 1 if depth == "num_layers" else -1
    more = layers | {depth: 3} | ({"num_hidden_layers": 3} if at == 1 else {})
    (less, _), (more, planned) = (kept_on_a_cpu("t5", at, **x) for x in (layers, more))
    assert more - less == planned


def kept_on_a_cpu(family: str, index: int = 1, **changes: Any) -> tuple[int, int]:
    """Returns the bytes that autograd keeps of a forward pass, and those that are planned for a layer."""
    stock, kept = tiny_model(family, **changes), list[Tensor]()
    source, lora, ids = stock.config.to_dict(), LoraConfig(), torch.ones(2, 16, dtype=torch.int64)
    model, shape = in_memory(stock, source, family), shape_from_config(source, "tiny")
    inputs = {"decoder_input_ids": ids} if shape.encoder_layers else {}
    network, index = add_lora(model, shape, lora, seed=0).train(), index % len(shape.layers)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(input_ids=ids, use_cache=False, **inputs)
    weights = {x.untyped_storage()._cdata for x in network.parameters()}
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    settings: dict[str, Any] = {"storage": FrozenStorage(), "lora": lora, "eager": True}
    planned = saved_by_layer(source, shape, index, (2, 16), torch.float32, **settings)
    return sum(size for key, size in storages.items() if key not in weights), planned


def test_logits_are_bounded_by_their_chunk() -> None:
    small, large, larger = (logits(SMALL, request(Cluster(1, 1)).batch(samples, 128)) for samples in (1, 4096, 4097))
    assert small == 128 * (SMALL.vocab_size * (4 + 2) + 2 * 512 * 2)
    assert larger - large == 128 * 2 * 512 * 2  # hidden states


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"), [(1000, 2.5, 19), (1000, 0.5, 3), (128, 1, 1), (12_800, 0.29, 29)]
)
def test_epochs_have_the_steps_that_the_run_makes_of_them(samples: int, epochs: float, steps: int) -> None:
    unknown = request(Cluster(1, 1), steps=None, epochs=epochs, global_batch_size=128)
    assert any("--samples" in note for note in notes(make_plan(unknown)))
    planned = build_request("small", SOURCE, SMALL, unknown.config, unknown.cluster, samples=samples)
    assert (planned.steps, planned.steps_known) == (steps, True)
    refuses("--samples 5 is less", build_request, "small", SOURCE, SMALL, unknown.config, unknown.cluster, samples=5)


def test_what_a_run_refuses_is_not_planned() -> None:
    source = tiny_config("mixtral").to_dict()
    refit = RunConfig("unused", prune=PruneConfig(ratio=0.3, protected_first=0, compensate="least_squares"))
    with pytest.raises(UserError, match="least_squares makes up for heads and channels"):
        build_request("mixtral", source, shape_from_config(source, "mixtral"), refit, Cluster(1, 1))


def test_a_network_between_nodes_makes_a_step_slower() -> None:
    one, two = (make_plan(request(Cluster(nodes, 8 // nodes))) for nodes in (1, 2))
    assert two.step.communication > 2 * one.step.communication


def test_an_impossible_cluster_is_refused() -> None:
    refuses("nan", Cluster, gpu_memory=math.nan)
    refuses("--reserve", Cluster, gpu_memory=2.0)
    refuses("GPUs", Cluster, nodes=10**6)


def with_hpz(tmp_path: Path, size: int | str, cluster: Cluster, **train: Any) -> Request:
    """The same run with hpZ."""
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = size
    (tmp_path / "hpz.json").write_text(json.dumps(settings))
    config = replace(request(cluster, **train).config, deepspeed=str(tmp_path / "hpz.json"))
    return build_request("small", SOURCE, SMALL, config, cluster)


def test_hpz_means_nothing_on_one_node_and_follows_whole_nodes(tmp_path: Path) -> None:
    one = with_hpz(tmp_path, "auto", Cluster(1, 4))
    assert make_plan(one).step == make_plan(request(Cluster(1, 4))).step
    assert changed(one, Cluster(2, 2)).fetch.zero_hpz_partition_size == 2
    assert changed(one, Cluster(2, 8)).fetch.zero_hpz_partition_size == 8

    assert with_hpz(tmp_path, 8, Cluster(4, 4)).fetch.zero_hpz_partition_size == 8  # two whole nodes
    with pytest.raises(UserError, match=r"zero_hpz_partition_size is 4, whose groups take parts of nodes of 6 GPUs"):
        with_hpz(tmp_path, 4, Cluster(2, 6), global_batch_size=24)


def test_nccl_takes_more_with_more_ranks() -> None:
    held = [Cluster(nodes, gpus).nccl_bytes for nodes, gpus in ((1, 1), (1, 2), (1, 8), (4, 8), (64, 8))]
    assert held[0] == 0
    assert held[2] == pytest.approx(4.34e9)  # as published
    assert held == sorted(held)
    assert Cluster(4, 8).gpu_bytes == int(77 * GIB) - held[3]
    assert Cluster(4, 8, nccl=1).gpu_bytes == 76 * GIB


def test_a_larger_model_and_fewer_ranks_need_more() -> None:
    plans = [make_plan(request(Cluster(1, ranks))) for ranks in (1, 2, 4, 8)]
    dense = [stage(plan, "dense") for plan in plans]
    assert [x.state["weights"] for x in dense] == [WEIGHTS // ranks for ranks in (1, 2, 4, 8)]
    after = stage(plans[0], "after the last cut")
    assert after.state["weights"] == 2 * plans[0].final.total_numel() < WEIGHTS
    assert after.peak < dense[0].peak
    assert not any(plans[0].step.sent.values())  # there is no other rank
    assert plans[3].step.sent["weights"] > plans[3].last_step.sent["weights"] > 0
    assert dense[0].phases["training"].get("gathered_weights", 0) == 0


def test_what_is_gathered_is_bounded_by_the_limits_and_by_the_model() -> None:
    plain = request(Cluster(1, 2))
    layer = 2 * (SMALL.layer_numel(0) + 2 * 512 + sum(SMALL.layer_lora_sizes(0, 8)))
    bucket = 2 * 2 * 512 * 1376  # of the largest linear
    whole = WEIGHTS + 2 * sum(SMALL.lora_sizes(8))
    assert gathered_weights(plain, SMALL) == whole + bucket
    assert gathered_weights(plain, SMALL, trains=False) == 2 * layer
    for live in (SMALL.layer_numel(0) // 2, 2 * SMALL.layer_numel(0)):
        few = changed(plain, deepspeed={"stage3_max_live_parameters": live})
        beside = 2 * live if live > SMALL.layer_numel(0) else 0  # nothing is fetched ahead of a larger module
        assert gathered_weights(few, SMALL) == pytest.approx(beside + 2 * layer, rel=1e-6)


def test_a_wide_model_keeps_a_layer_that_is_computed_again_and_sends_it_three_times() -> None:
    source = SOURCE | {"hidden_size": 4608, "num_attention_heads": 36, "num_key_value_heads": 36}
    wide = shape_from_config(source, "wide")
    plain = build_request("wide", source, wide, request(Cluster(1, 2)).config, Cluster(1, 2))
    few = {"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0}
    one, again = (changed(plain, train={"gradient_checkpointing": on}, deepspeed=few) for on in (False, True))
    layer, linear = 2 * wide.layer_numel(0), 2 * 4608 * 4608
    most = layer + 2 * linear
    assert most < gathered_weights(again, wide) < 1.01 * most
    sent = [make_plan(x).step.sent["weights"] for x in (one, again)]
    assert 2 * sent[1] == 3 * sent[0]


def test_checkpointing_trades_memory_for_arithmetic() -> None:
    plain, checkpointed = (make_plan(request(Cluster(1, 4), gradient_checkpointing=on)) for on in (False, True))
    held = [stage(plan, "dense").phases["training"]["activations"] for plan in (plain, checkpointed)]
    assert held[1] < held[0] / 2
    assert checkpointed.step.sent["weights"] == plain.step.sent["weights"]  # layers that are gathered whole
    assert checkpointed.step.compute > plain.step.compute


def test_a_run_that_does_not_fit_is_told_what_to_change() -> None:
    plan = make_plan(request(tight(2, 40), micro_batch_size=4))
    assert not plan.fits
    changes = {x["change"]: x for x in suggestions(plan)}
    assert changes["one sample at a time"]["device_bytes"] < plan.device_bytes
    assert changes["activation checkpointing"]["device_bytes"] < plan.device_bytes
    offloaded = changes["optimizer and weights on the host"]
    assert offloaded["device_bytes"] < plan.device_bytes
    assert offloaded["host_bytes"] > plan.host_bytes
    assert changes["all of the above"]["device_bytes"] < offloaded["device_bytes"]


def test_the_search_finds_the_fewest_gpus_that_can_split_the_batch() -> None:
    asked = changed(
        request(Cluster(1, 1), shape=SMALL.with_layers(SMALL.layers * 8)),
        deepspeed={"stage3_max_live_parameters": 1000, "stage3_max_reuse_distance": 0},
    )
    needs = {n: make_plan(changed(asked, Cluster(1, n))).device_bytes / 1e6 for n in (1, 2, 4, 8)}
    assert needs[8] < needs[4] < min(needs[1], needs[2])
    found, reason = search(asked, tight(8, needs[4] + 1), 1)
    assert (found.fits, found.request.world_size, reason) == (True, 4, "")  # micro-batches of 2 leave no 3
    found, reason = search(asked, tight(2, needs[4] + 1), 2)
    assert (found.request.cluster.nodes, found.request.cluster.gpus_per_node, reason) == (2, 2, "")
    largest, reason = search(asked, tight(8, 1), 512)
    assert largest.request.world_size == 32  # 64 samples in micro-batches of 2
    assert reason.startswith("small fits on no cluster of up to 512 x 8 GPUs of 3.0")


def test_the_largest_micro_batch_that_fits_is_proposed() -> None:
    plan = make_plan(request(Cluster(1, 4), micro_batch_size=1))
    assert largest_micro_batch(plan) == 16  # all of a rank's part of the batch
    needs = {size: make_plan(request(Cluster(1, 4), micro_batch_size=size)).device_bytes for size in (1, 4, 8)}
    assert needs[1] < needs[4] < needs[8]
    between = make_plan(request(tight(4, (needs[4] + needs[8]) / 2e6), micro_batch_size=1))
    assert largest_micro_batch(between) == 4
    assert largest_micro_batch(make_plan(request(tight(4, 1)))) is None


def test_settings_of_quality_cost_what_they_hold_and_send() -> None:
    plain = request(Cluster(1, 2), steps=40, global_batch_size=16)

    def pruning(**prune: Any) -> Plan:
        return make_plan(changed(plain, prune=prune))

    lora, fisher = (pruning(criterion=x) for x in ("lora", "fisher"))
    groups = sum(sum(layer.values()) for layer in SMALL.layers)
    assert fisher.step.sent["scoring"] == 8 * groups < lora.step.sent["scoring"]
    assert fisher.last_step == lora.last_step
    refit = pruning(compensate="least_squares", compensate_steps=2)
    moments = 4 * (512**2 + 1376**2) * 2  # of two of the four layers that may be cut
    assert stage(refit, "dense").state == stage(lora, "dense").state | {"input_moments": moments}
    assert stage(refit, "the first cut").peak_phase == "refit"
    assert refit.first_cut.sent["cut"] > lora.first_cut.sent["cut"]
    assert refit.checkpoint_bytes == lora.checkpoint_bytes + WEIGHTS + 2 * moments


def test_recovery_and_the_teachers_passes_are_in_all() -> None:
    settings: dict[str, Any] = {"distill_weight": 0.5}
    distilled, longer = (make_plan(request(Cluster(1, 2), **settings, recovery_steps=x)) for x in (0, 30))
    assert (distilled.request.steps, longer.request.steps) == (20, 50)
    cuts = [plan.request.pruning.schedule.cut_steps() for plan in (longer, distilled)]
    assert cuts[0] == cuts[1] != []
    assert stage(distilled, "dense").phases["teacher's pass"]["targets"] == 2 * 64 * 512 * 2
    added = 30 * distilled.last_step.total.at_least
    assert longer.in_all.at_least == pytest.approx(distilled.in_all.at_least + added)


def test_a_teacher_is_held_and_asked_in_every_step() -> None:
    plain = request(Cluster(1, 2))
    distilled = changed(plain, train={"distill_weight": 0.5})
    before, after = make_plan(plain), make_plan(distilled)
    held = (WEIGHTS - 2 * 1000 * 512) // 2  # all but the head
    assert [x.state["teacher"] for x in after.stages] == [held] * 3
    attention = 6 * 2 * (2 * 512 * 64) / 2  # layers, products, elements over half a window
    operations = (2 * SMALL.linear_numel() + attention) * 64 * 64 / 2
    for one, other in ((before.step, after.step), (before.last_step, after.last_step)):
        added = (other.compute - one.compute) * plain.cluster.flops * plain.cluster.utilisation * 1e12
        assert added == pytest.approx(operations)
        assert other.sent["weights"] - one.sent["weights"] == distilled.micro_batches * held  # to the other rank
    assert any(x["change"] == "no distillation" for x in suggestions(after))
    away = make_plan(changed(distilled, deepspeed={"offload_param": {"device": "cpu"}}))
    assert (away.stages[0].host["teacher"], away.stages[0].state.get("teacher")) == (held, None)


def test_hpz_keeps_a_copy_in_every_node_and_its_gathers_inside(tmp_path: Path) -> None:
    cluster = Cluster(2, 4)
    plain, copied = make_plan(request(cluster)), make_plan(with_hpz(tmp_path, "auto", cluster))
    assert plain.stages[0].state | {"second_copy": WEIGHTS // 4} == copied.stages[0].state
    # LoRA is new in every step: its first gather goes to all ranks.
    lora = sum(SMALL.lora_sizes(8)) // 8 * 2
    assert copied.step.sent["weights"] == 7 * lora
    passes, shards = copied.request.micro_batches, WEIGHTS // 8 + lora
    assert copied.step.sent["weights_in_group"] == (passes * shards - lora) * 3 * 2
    others = sum(copied.step.sent.values()) - copied.step.sent["weights_in_group"]
    assert copied.step.between_nodes == pytest.approx(others * 4 / 7)
    assert copied.step.communication < plain.step.communication
    assert any("zero3_multinode_hpz.json" in note for note in notes(plain))
    assert not any("zero3_multinode_hpz.json" in note for note in notes(copied))


def test_int8_weights_take_a_byte_and_a_scale_per_64() -> None:
    dense = request(Cluster(1, 2))
    int8 = changed(dense, model={"frozen": "int8"})
    linears = SMALL.linear_numel()
    rest = SMALL.total_numel() - linears
    weights = split_state(int8, int8.shape)[0]["weights"]
    assert 2 * weights == linears + 2 * linears // 64 + 2 * rest  # nothing is padded
    plans = [make_plan(one) for one in (dense, int8)]
    assert [plan.stages[-1].name for plan in plans] == ["after the last cut", "exported"]
    saved = plans[0].step.sent["weights"] - plans[1].step.sent["weights"]
    assert saved == dense.micro_batches * linears * 31 // 64  # a rank sends half of the linears, once
    alone = changed(dense, Cluster(1, 1), model={"frozen": "int8"})
    assert gathered_weights(alone, alone.shape) == 2 * 512 * 1376  # one dequantised linear


def test_json_holds_what_the_table_shows() -> None:
    plan = make_plan(request(Cluster(2, 2)))
    found = plan_json(plan, 1.0)
    assert found["parameters"] == SMALL.total_numel()
    assert found["device_bytes"] == max(x["peak"] for x in found["stages"])
    assert json.loads(json.dumps(found, allow_nan=False))["fits"] is True
    table = plan_table(plan, found)
    assert "small fits on 4 GPUs" in table
    assert "\n+ repartition " in table  # the worst phase of the first cut
    for name, key in (("peak", "peak"), ("  while", "peak_phase")):
        (row,) = (line.removeprefix(name) for line in table.splitlines() if line.startswith(f"{name} "))
        cells = [x[key] if key == "peak_phase" else f"{x[key] / GIB:.2f}" for x in found["stages"]]
        assert row.split() == " ".join(cells).split()
