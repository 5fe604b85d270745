"""Checks the arithmetic of the planner, without ranks."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loraprune_ds.config import DataConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.errors import UserError
from loraprune_ds.model.distillation import check_top_k
from loraprune_ds.model.per_kind import LayerShape
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.plan.activations import PlannedBatch, saved_by_layer
from loraprune_ds.plan.advice import largest_micro_batch, search, smallest_plan, suggestions
from loraprune_ds.plan.cluster import GIB, Cluster
from loraprune_ds.plan.distillation_pass import DistillationPass
from loraprune_ds.plan.fetching import PassTraffic
from loraprune_ds.plan.held import split_state
from loraprune_ds.plan.plan import MOST_CUTS, Plan, make_plan
from loraprune_ds.plan.printout import notes, plan_json, plan_table
from loraprune_ds.plan.request import LLAMA, Request, build_request, changed, make_request, read_shape
from loraprune_ds.plan.traffic import scales_sent, step_kinds
from loraprune_ds.train.data.order import SampleOrder
from tests.families import tiny_config

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
SOURCE = CONFIG | {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1376,
    "vocab_size": 1000,
}
SMALL = shape_from_config(SOURCE, "somewhere")
LONG = SMALL.with_layers(SMALL.layers * 8)
WEIGHTS = SMALL.total_numel() * 2
OPEN_LAYERS = 4  # of the 6, as the first and the last are protected: nobody measures these


def request(cluster: Cluster, *, steps: int | None = 20, shape: ModelShape = SMALL, **train: Any) -> Request:
    settings: dict[str, Any] = {"steps": steps, "global_batch_size": 64} | train
    config = RunConfig(
        output_dir="unused",
        data=DataConfig(window=64),
        prune=PruneConfig(ratio=0.5, channel_multiple=1, prune_every=5),
        train=TrainConfig(**settings),
    )
    return build_request("small", SOURCE, shape, config, cluster)


def tight(gpus: int, megabytes: float) -> Cluster:
    """GPUs that have so much memory for the run."""
    return Cluster(1, gpus, gpu_memory=3 + megabytes * 1e6 / GIB, nccl=0)


LITTLE_GATHERED = {"stage3_max_live_parameters": 4_000_000, "stage3_max_reuse_distance": 0}
SPARING = changed(request(Cluster(1, 1), shape=LONG), deepspeed=LITTLE_GATHERED)  # more ranks, less per rank


def test_llama_65b_has_its_published_number_of_parameters() -> None:
    counts = {name: read_shape(name).total_numel() for name in LLAMA}
    assert counts["llama-65b"] == 65_285_660_672
    assert counts["llama-7b"] == 6_738_415_616
    assert [round(n / 1e8) / 10 for n in counts.values()] == [6.7, 13.0, 32.5, 65.3]


def test_weights_fall_with_the_ranks_and_with_every_cut() -> None:
    plans = [make_plan(request(Cluster(1, ranks))) for ranks in (1, 2, 4, 8)]
    weights = [plan.stages[1].state["weights"] for plan in plans]
    assert weights == [WEIGHTS // ranks for ranks in (1, 2, 4, 8)]
    parameters = [cut.parameters for cut in plans[0].cuts]
    assert parameters == sorted(parameters, reverse=True)
    assert plans[0].stages[-1].state["weights"] == 2 * parameters[-1]
    assert not any(plans[0].step.sent.values())  # nobody to send to
    assert plans[3].step.sent["weights"] > plans[3].last_step.sent["weights"] > 0


def test_a_run_that_does_not_fit_is_told_what_to_change() -> None:
    plan = make_plan(request(tight(2, 40), micro_batch_size=4))
    assert not plan.fits
    changes = {s.change: s for s in suggestions(plan)}
    assert changes["one sample at a time"].device_bytes < plan.device_bytes
    assert changes["activation checkpointing"].device_bytes < plan.device_bytes
    offloaded = changes["optimizer and weights on the host"]
    assert offloaded.device_bytes < plan.device_bytes
    assert offloaded.host_bytes > plan.host_bytes
    assert changes["all of the above"].device_bytes < offloaded.device_bytes
    assert "does not fit on 2 GPUs" in plan_table(plan, list(changes.values()))


def test_the_smallest_cluster_fits_and_the_next_smaller_one_does_not() -> None:
    needs = {n: make_plan(changed(SPARING, Cluster(1, n))).device_bytes for n in (1, 2, 4, 8)}
    assert needs[8] < needs[4] < min(needs[1], needs[2])
    found = smallest_plan(SPARING, tight(8, needs[4] / 1e6 + 1))
    assert found is not None
    assert found.fits
    assert found.request.cluster.world_size == 4  # 64 samples in micro-batches of 2 cannot be split over 3


def test_no_cluster_is_large_enough() -> None:
    asked, cluster = request(tight(1, 1)), tight(8, 1)
    assert smallest_plan(asked, cluster) is None
    largest, reason = search(asked, cluster, 512)
    assert largest.request.world_size == 32  # 64 samples in micro-batches of 2
    assert reason.startswith("small fits on no cluster of up to 512 x 8 GPUs of 3.0")


def test_the_search_ends_at_the_nodes_there_are() -> None:
    needs = make_plan(changed(SPARING, Cluster(2, 2))).device_bytes / 1e6
    cluster = tight(2, needs + 1)
    largest, reason = search(SPARING, cluster, 1)
    assert largest.request.world_size == 2
    assert reason
    found, reason = search(SPARING, cluster, 2)
    assert not reason
    assert (found.request.cluster.nodes, found.request.cluster.gpus_per_node) == (2, 2)


def test_host_memory_can_be_what_does_not_fit() -> None:
    plan = make_plan(request(Cluster(1, 8, host_memory=8)))
    assert plan.fits_device
    assert not plan.fits_host
    assert not plan.fits


def test_offload_moves_bytes_from_the_gpu_to_the_host() -> None:
    plain = request(Cluster(1, 2))
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = changed(plain, deepspeed=away)
    dense, host = make_plan(plain).stages[1], make_plan(offloaded).stages[1]
    moved = ("weights", "lora", "lora_masters", "lora_moments", "lora_gradients")
    assert not set(moved) & set(host.state)
    assert {term: host.host[term] for term in moved} == {term: dense.state[term] for term in moved}
    assert make_plan(offloaded).step.host_copies > 0


def test_pinned_blocks_are_rounded_up_to_powers_of_two() -> None:
    def host(pinned: bool, shape: ModelShape = SMALL) -> dict[str, int]:
        both = {f"offload_{what}": {"device": "cpu", "pin_memory": pinned} for what in ("param", "optimizer")}
        return make_plan(changed(request(Cluster(1, 2), shape=shape), deepspeed=both)).stages[1].host

    plain, pinned = host(pinned=False), host(pinned=True)
    # Pieces of the channels' linears have 512 * 1376 elements, those of embedding and head 512 * 1000, half of each on
    # a rank, in bf16: 688 and 500 KiB. All others are powers of two.
    frozen = (6 * 3 * (1024 - 688) + 2 * (512 - 500)) * 1024
    lora, gradients = (1 << (n - 1).bit_length() for n in (plain["lora"], plain["lora_gradients"]))
    rounding = frozen + lora - plain["lora"] + 2 * (gradients - plain["lora_gradients"])
    assert pinned == plain | {"pinned_rounding": rounding}
    assert plain["lora_gradients_for_the_step"] == plain["lora_gradients"]


def test_checkpointing_trades_memory_for_arithmetic() -> None:
    plain, checkpointed = (make_plan(request(Cluster(1, 4), gradient_checkpointing=on)) for on in (False, True))
    held = [plan.stages[1].phases["training"]["activations"] for plan in (plain, checkpointed)]
    assert held[1] < held[0] / 2
    # A layer that is gathered as one is there for its backward pass when it is computed again.
    assert checkpointed.step.sent["weights"] == plain.step.sent["weights"]
    assert checkpointed.step.compute > plain.step.compute


def saved_by_autograd(attention: str, dtype: torch.dtype, key_heads: int) -> int:
    """Bytes of a tiny LLaMA's forward pass, weights apart."""
    sizes: dict[str, Any] = {k: v for k, v in CONFIG.items() if k != "model_type"}
    config = LlamaConfig(**sizes, num_key_value_heads=key_heads, use_cache=False)
    config._attn_implementation = attention
    model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model(input_ids=torch.arange(64).view(2, 32))
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_keeps_its_probabilities(dtype: torch.dtype, key_heads: int) -> None:
    source = CONFIG | {"num_key_value_heads": key_heads}
    shape = shape_from_config(source, "tiny")
    batches = [PlannedBatch(2, 32, dtype.itemsize, eager) for eager in (True, False)]
    planned = [
        sum(saved_by_layer(source, shape, i, batch, lora_rank=8, dropout=False) for i in range(len(shape.layers)))
        for batch in batches
    ]
    counted = [saved_by_autograd(attention, dtype, key_heads) for attention in ("eager", "sdpa")]
    assert planned[0] - planned[1] == counted[0] - counted[1] > 0


def test_a_run_with_eager_attention_needs_more() -> None:
    plain = request(Cluster(1, 2))
    eager = make_plan(changed(plain, model={"attn_implementation": "eager"}))
    for moment in ("training", "evaluation"):
        held = [plan.stages[1].phases[moment]["activations"] for plan in (eager, make_plan(plain))]
        assert held[0] > held[1]
    assert eager.step.compute > make_plan(plain).step.compute


def test_logits_are_bounded_by_their_chunk() -> None:
    plans = [make_plan(request(Cluster(1, 1), loss_chunk_tokens=chunk)) for chunk in (16, 32)]
    found = [plan.stages[1].phases["training"]["logits"] for plan in plans]
    assert found[1] - found[0] == 16 * SMALL.vocab_size * (4 + 2)


def test_epochs_need_the_number_of_samples() -> None:
    unknown = request(Cluster(1, 1), steps=None, epochs=2)
    assert any("--samples" in note for note in notes(make_plan(unknown)))
    config = replace(unknown.config)
    known = build_request("small", SOURCE, SMALL, config, Cluster(1, 1), samples=640)
    assert (known.steps, known.steps_known) == (20, True)
    with pytest.raises(UserError, match="--samples 5 is less"):
        build_request("small", SOURCE, SMALL, config, Cluster(1, 1), samples=5)


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"), [(1000, 2.5, 19), (1000, 0.5, 3), (128, 1.0, 1), (12_800, 0.29, 29)]
)
def test_epochs_have_the_steps_that_the_run_makes_of_them(samples: int, epochs: float, steps: int) -> None:
    config = request(Cluster(1, 1), steps=None, epochs=epochs, global_batch_size=128).config
    planned = build_request("small", SOURCE, SMALL, config, Cluster(1, 1), samples=samples)
    assert planned.steps == SampleOrder(samples, 128, seed=0).steps_for_epochs(epochs) == steps


def test_what_a_run_of_the_family_refuses_is_not_planned() -> None:
    source = tiny_config("mixtral").to_dict()
    config = RunConfig("unused", prune=PruneConfig(channel_multiple=1, compensate="least_squares"))
    with pytest.raises(UserError, match="least_squares makes up for heads and not for experts"):
        build_request("mixtral", source, shape_from_config(source, "mixtral"), config, Cluster(1, 1))


@pytest.mark.parametrize("steps", [None, 20])
@pytest.mark.parametrize("samples", [-5, 0, 63])
def test_too_few_samples_are_refused(samples: int, steps: int | None) -> None:
    config = request(Cluster(1, 1), steps=steps, epochs=None if steps else 1).config
    with pytest.raises(UserError, match=f"--samples {samples} is less than train.global_batch_size 64"):
        build_request("small", SOURCE, SMALL, config, Cluster(1, 1), samples=samples)


def test_recovery_steps_come_after_the_schedule_and_cost_what_steps_cost() -> None:
    settings: dict[str, Any] = {"distill_weight": 0.5}
    plain, longer = (make_plan(request(Cluster(1, 2), **settings, recovery_steps=n)) for n in (0, 30))
    assert (plain.request.steps, longer.request.steps) == (20, 50)
    assert longer.request.schedule == plain.request.schedule
    assert longer.cuts == plain.cuts
    assert longer.teacher_bytes == plain.teacher_bytes * 50 // 20
    added = 30 * plain.last_step.hidden + 1.5 * plain.teacher.hidden
    assert longer.in_all.hidden == pytest.approx(plain.in_all.hidden + added)
    assert changed(longer.request, Cluster(1, 4)).steps == 50


def test_of_many_cuts_some_are_planned_each_from_the_shape_just_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    many = request(Cluster(1, 2), steps=4 * 5 * MOST_CUTS)
    some = make_plan(many)
    monkeypatch.setattr("loraprune_ds.plan.plan.MOST_CUTS", 10_000)
    every = make_plan(many)
    steps = many.schedule.cut_steps()
    assert len(some.cuts) == MOST_CUTS < len(every.cuts) == len(steps)
    assert [cut.step for cut in every.cuts] == steps
    assert all(one.state_after == other.state_before for one, other in pairwise(every.cuts))
    for cut in some.cuts:
        assert cut == every.cuts[steps.index(cut.step)]
    assert (some.cuts[0].step, some.cuts[-1].step) == (steps[0], steps[-1])
    assert some.in_all == every.in_all


def test_of_very_many_cuts_a_part_tells_what_all_of_them_send(monkeypatch: pytest.MonkeyPatch) -> None:
    many = request(
        Cluster(1, 2), steps=4 * 5 * MOST_CUTS, shape=SMALL.with_layers((LayerShape(heads=64, channels=8192),) * 6)
    )
    every = make_plan(many).in_all.sent
    monkeypatch.setattr("loraprune_ds.plan.plan._all_cuts", lambda request: np.zeros(3))
    of_cuts = every - make_plan(many).in_all.sent
    monkeypatch.undo()
    monkeypatch.setattr("loraprune_ds.plan.plan.MOST_SUMMED", len(many.schedule.cut_steps()) // 2)
    assert make_plan(many).in_all.sent == pytest.approx(every, abs=0.25 * of_cuts)


def pruning(plain: Request, **prune: Any) -> Plan:
    """The plan of the same run with other values of `prune`."""
    return make_plan(changed(plain, prune=prune))


def test_fisher_sends_scores_alone_and_costs_next_to_nothing() -> None:
    plain = request(Cluster(1, 2), steps=40, global_batch_size=16)
    lora, fisher = pruning(plain), pruning(plain, criterion="fisher")
    groups = sum(sum(layer.values()) for layer in SMALL.layers)
    assert fisher.step.sent["scoring"] == 8 * groups
    assert fisher.step.sent | {"scoring": 0} == lora.step.sent | {"scoring": 0}
    assert fisher.last_step.compute < fisher.step.compute < lora.step.compute
    assert fisher.last_step == lora.last_step


def test_the_true_gradient_costs_arithmetic_on_the_steps_that_score() -> None:
    plain = request(Cluster(1, 2), steps=40, global_batch_size=16)
    tokens = 16 * 64 / 2
    lora, always = pruning(plain), pruning(plain, criterion="gradient")
    seldom = pruning(plain, criterion="gradient", score_every=10)
    numel = SMALL.linear_numel()
    formed, spared = 2 * numel * tokens, 4 * plain.config.lora.r * numel / 2  # no estimate of it is made
    added = (always.step.compute - lora.step.compute) * plain.cluster.flops * 1e12
    assert added == pytest.approx(formed - spared)
    assert seldom.step == always.step
    assert always.last_step == lora.last_step
    assert lora.in_all.sent < seldom.in_all.sent < always.in_all.sent
    assert seldom.in_all.exposed < always.in_all.exposed
    scored = sum(seldom.request.schedule.is_scored(step) for step in range(1, 41))
    assert scored < sum(plain.schedule.is_scored(step) for step in range(1, 41))
    assert any(f"of 40 steps {scored} score and 0 measure" in note for note in notes(seldom))
    assert not any("score and" in note for note in notes(lora))


def test_moments_cost_arithmetic_on_the_steps_that_measure() -> None:
    plain = request(Cluster(1, 1), steps=40, global_batch_size=16)
    tokens = 16 * 64
    none = pruning(plain)
    bands = 512 * 512 + 1024 * 1376 + 352 * 352  # 1,024 rows of a moment at a time, from the diagonal on
    one, three = (pruning(plain, compensate="least_squares", compensate_steps=n) for n in (1, 3))
    added = (one.step.compute - none.step.compute) * plain.cluster.flops * 1e12
    assert added == pytest.approx(OPEN_LAYERS * 2 * bands * tokens, rel=1e-6)
    measured = [sum(kind.measures for kind in step_kinds(plan.request)) for plan in (one, three)]
    cuts = plain.schedule.cut_steps()
    assert measured == [len(cuts), len({step - before for step in cuts for before in range(3)})]
    assert one.in_all.exposed < three.in_all.exposed


def test_a_checkpoint_holds_the_moments_of_all_ranks() -> None:
    plain = request(Cluster(1, 4))
    none, refitted = (pruning(plain, compensate=c) for c in ("none", "least_squares"))
    widths = [4 * 2 * 64, 1376]
    assert "input_moments" not in none.checkpoint
    assert refitted.checkpoint["input_moments"] == OPEN_LAYERS * 4 * sum(n * n for n in widths)
    assert "weights" not in none.checkpoint  # slices of the source
    assert refitted.checkpoint["weights"] == 2 * refitted.cuts[0].parameters
    assert none.checkpoint["lora_state"] == sum(none.stages[1].state[t] for t in ("lora_masters", "lora_moments")) * 4
    copied = make_plan(changed(plain, checkpoint={"copy_source": True}))
    assert copied.checkpoint["weights"] == WEIGHTS
    found = plan_json(refitted, [])["checkpoint"]
    assert (found["disk_bytes"], found["at_once"]) == (sum(refitted.checkpoint.values()), 3)
    assert "input moments" in plan_table(refitted, [])


def test_in_all_holds_the_pass_of_the_dense_model() -> None:
    plain, distilled = (make_plan(request(Cluster(1, 2), distill_weight=weight)) for weight in (0.0, 0.5))
    assert distilled.teacher.exposed > 0
    added = distilled.in_all.exposed - plain.in_all.exposed
    assert added == pytest.approx(distilled.teacher.exposed)
    assert distilled.in_all.sent > plain.in_all.sent


def test_the_pass_of_the_dense_model_is_a_stage_of_its_own() -> None:
    plain, distilled, top = (
        make_plan(request(Cluster(1, 2), distill_weight=weight, distill_top_k=k, micro_batch_size=2))
        for weight, k in ((0.0, None), (0.5, None), (0.5, 8))
    )
    names = [stage.name for stage in distilled.stages]
    assert names == ["loading", "dense model's pass", *(stage.name for stage in plain.stages[1:])]
    stage, of_top = distilled.stages[1], top.stages[1]
    assert stage.state == distilled.stages[2].state | {"lora_moments": 0}
    tokens = 8 * 64  # evaluate.batch_size is above the micro-batch
    assert stage.phases["pass"]["targets"] == tokens * 512 * 2
    assert of_top.phases["pass"]["targets"] == tokens * (1000 * 8 + 12 * 8 + 4)
    assert stage.host["teacher_file"] == 2 * 64 * 63 * 512 * 2
    assert of_top.host["teacher_file"] == 2 * 64 * 63 * (8 * 8 + 4)
    assert "dense model's pass" in plan_table(distilled, [])
    assert "dense model's pass" not in plan_table(plain, [])


@pytest.mark.parametrize(("samples", "gpus", "passes"), [(64, 1, 8), (64, 2, 8), (128, 2, 8), (129, 2, 16), (9, 4, 2)])
def test_ranks_out_of_files_make_as_many_passes(samples: int, gpus: int, passes: int) -> None:
    plan = request(Cluster(1, gpus), steps=None, epochs=9, distill_weight=0.5, micro_batch_size=2, global_batch_size=8)
    assert DistillationPass(replace(plan, samples=samples), PassTraffic()).batches == passes


def test_the_dense_models_pass_gathers_no_lora() -> None:
    plan = request(Cluster(1, 2), distill_weight=0.5)
    sizes = SMALL.lora_sizes(plan.config.lora.r)
    found = DistillationPass(plan, PassTraffic(sent=10**9))
    assert found.cost().sent["weights"] == found.batches * (10**9 - 2 * (sum(sizes) // 2))  # all are even: no padding


def test_json_holds_what_the_table_shows() -> None:
    plan = make_plan(request(Cluster(2, 2)))
    found = plan_json(plan, [])
    assert found["parameters"] == SMALL.total_numel()
    assert found["fits"] is True
    assert found["device_bytes"] == max(stage["peak"] for stage in found["stages"])
    assert (
        found["seconds_per_step"]["before_any_cut"]["hidden"] <= found["seconds_per_step"]["before_any_cut"]["exposed"]
    )


def test_a_network_between_nodes_makes_a_step_slower() -> None:
    one, two = (make_plan(request(Cluster(nodes, 8 // nodes))) for nodes in (1, 2))
    assert two.step.communication > 2 * one.step.communication


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 0}, "--nodes must be a number above 0; got 0"),
        ({"gpu_memory": float("nan")}, "--gpu-memory must be a number above 0; got nan"),
        ({"flops": -1.0}, "--flops must be a number above 0; got -1.0"),
        ({"gpu_memory": 2.0}, "--gpu-memory 2.0 leaves nothing beside --reserve 3.0"),
        ({"nodes": 10**6, "gpus_per_node": 8}, "is more than 1048576 GPUs"),
    ],
)
def test_an_impossible_cluster_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Cluster(**wrong)


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(UserError, match="cannot be split over 3 ranks"):
        request(Cluster(1, 3))


def with_hpz(tmp_path: Path, size: int | str, cluster: Cluster, **train: Any) -> Request:
    """The same run with hpZ."""
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = size
    (tmp_path / "hpz.json").write_text(json.dumps(settings))
    config = replace(request(cluster, **train).config, deepspeed=str(tmp_path / "hpz.json"))
    return build_request("small", SOURCE, SMALL, config, cluster)


def test_hpz_keeps_a_copy_in_every_node_and_its_gathers_inside(tmp_path: Path) -> None:
    cluster = Cluster(2, 4)
    plain, copied = make_plan(request(cluster)), make_plan(with_hpz(tmp_path, "auto", cluster))
    assert plain.stages[1].state | {"second_copy": WEIGHTS // 4} == copied.stages[1].state
    assert "second_copy" not in copied.stages[0].host | copied.stages[0].phases["engine starts"]  # no pass was made yet
    assert copied.cuts[0].state_before - plain.cuts[0].state_before == WEIGHTS // 4
    # LoRA is new in every step: its first gather goes to all ranks.
    lora = sum(SMALL.lora_sizes(8)) // 8 * 2
    assert copied.step.sent["weights"] == 7 * lora
    others = copied.request.micro_batches - 1
    assert others == 3
    assert copied.step.sent["weights_in_group"] > plain.step.sent["weights"] * 3 / 7 - 4 * 7 * lora
    everything = sum(copied.step.sent.values()) - copied.step.sent["weights_in_group"]
    assert copied.step.between_nodes == everything * 4 // 7
    assert plain.step.between_nodes == sum(plain.step.sent.values()) * 4 // 7
    assert copied.step.communication < plain.step.communication
    assert any("zero3_multinode_hpz.json" in note for note in notes(plain))
    assert not any("zero3_multinode_hpz.json" in note for note in notes(copied))


def test_hpz_means_nothing_on_one_node_and_follows_the_cluster(tmp_path: Path) -> None:
    one = with_hpz(tmp_path, "auto", Cluster(1, 4))
    assert make_plan(one).step == make_plan(request(Cluster(1, 4))).step
    assert changed(one, Cluster(2, 2)).fetch_limits.copy_ranks == 2
    assert changed(one, Cluster(2, 8)).fetch_limits.copy_ranks == 8


def test_hpz_over_parts_of_nodes_is_refused(tmp_path: Path) -> None:
    assert with_hpz(tmp_path, 8, Cluster(4, 4)).fetch_limits.copy_ranks == 8  # two whole nodes
    with pytest.raises(UserError, match=r"zero_hpz_partition_size is 4, whose groups take parts of nodes of 6 GPUs"):
        with_hpz(tmp_path, 4, Cluster(2, 6), global_batch_size=24)


def test_nccl_takes_more_with_more_ranks() -> None:
    held = [Cluster(nodes, gpus).nccl_bytes for nodes, gpus in ((1, 1), (1, 2), (1, 8), (4, 8), (64, 8))]
    assert held[0] == 0
    assert held[2] == pytest.approx(4.34e9)  # as published
    assert held == sorted(held)
    assert Cluster(4, 8).gpu_bytes == int(77 * GIB) - held[3]
    assert Cluster(4, 8, nccl=1).gpu_bytes == 76 * GIB


def test_the_largest_micro_batch_that_fits_is_proposed() -> None:
    plan = make_plan(request(Cluster(1, 4), micro_batch_size=1))
    assert largest_micro_batch(plan) == 16  # all of a rank's part of the batch
    needs = {size: make_plan(request(Cluster(1, 4), micro_batch_size=size)).device_bytes for size in (1, 4, 8)}
    assert needs[1] < needs[4] < needs[8]
    between = tight(4, (needs[4] + needs[8]) / 2e6)
    found = make_plan(request(between, micro_batch_size=1))
    assert largest_micro_batch(found) == 4
    assert "--set train.micro_batch_size=4 fits: 256 tokens, 4 a step" in plan_table(found, [], largest=4)
    assert "a pass has 64 tokens (1 x 64), a step 16 of them" in plan_table(found, [], largest=4)
    assert plan_json(found, [], largest=4)["micro_batch"] == {
        "size": 1,
        "largest_that_fits": 4,
        "tokens_per_pass": 64,
        "passes_per_step": 16,
    }
    assert largest_micro_batch(make_plan(request(tight(4, 1)))) is None


def test_the_host_works_for_every_module_of_every_pass() -> None:
    one, four = (make_plan(request(Cluster(1, 4), micro_batch_size=size)) for size in (16, 4))
    assert four.step.host == pytest.approx(4 * one.step.host)
    again = make_plan(request(Cluster(1, 4), micro_batch_size=16, gradient_checkpointing=True))
    assert again.step.host == pytest.approx(1.5 * one.step.host)  # three passes over the layers instead of two
    assert one.step.hidden >= one.step.host
    free = make_plan(request(Cluster(1, 4, host_microseconds=0), micro_batch_size=16))
    assert one.step.exposed - free.step.exposed == pytest.approx(one.step.host)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "config.json must hold a JSON object"),
        ("{", "config.json is not valid JSON"),
        (json.dumps(CONFIG | {"per_layer_config": [1, 2]}), "config.json holds a size that is no number"),
    ],
)
def test_a_config_json_that_is_none_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_shape(str(tmp_path))


def test_what_the_run_refuses_of_a_model_the_plan_refuses() -> None:
    config = request(Cluster()).config
    top = replace(config, train=replace(config.train, distill_weight=0.5, distill_top_k=1001))
    with pytest.raises(UserError, match=r"distill_top_k 1001 is above the model's vocabulary of 1000") as planned:
        build_request("small", SOURCE, SMALL, top, Cluster())
    with pytest.raises(UserError) as ran:
        check_top_k(1001, 1000)
    assert str(planned.value) == str(ran.value)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model \./nowhere does not exist; give a folder, a hub id, or one of llama-7b"
    ):
        make_request("./nowhere", Cluster())


def test_the_shipped_config_comes_with_the_name() -> None:
    found = make_request("llama-65b", Cluster(4, 8), overrides=["train.micro_batch_size=4"])
    assert found.config.train.gradient_checkpointing
    assert found.config.train.micro_batch_size == 4
    assert len(found.shape.layers) == 80


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
    training = plans[1].stages[1].phases["training"]
    assert training["dequantised_linear"] == 2 * SMALL.hidden_size * 1376
    assert "with bfloat16: small fits" in plan_table(plans[1], [], plans[0])
    assert plan_json(plans[0], [], other=plans[1])["other_form"]["held_as"] == "bfloat16 with int8 linears"


def test_of_int8_weights_only_edges_of_scales_are_sent_to_score() -> None:
    shape = replace(SMALL, int8=True)
    for ranks in (1, 2, 3, 8):
        sent = scales_sent(request(Cluster(1, ranks), shape=shape, global_batch_size=48), shape)
        two_rows = 2 * sum(
            shape.form(x).held(shape.linear_shape(0, x), 2)["weight_scale"].shape[1] for x in shape.linears(0)
        )
        assert 0 < sent < 2 * len(shape.layers) * two_rows if ranks == 3 else sent == 0
