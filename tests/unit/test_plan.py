"""Checks the arithmetic of the planner, without ranks."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.config import DataConfig, ModelConfig, PruneConfig, RunConfig, TrainConfig
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.plan.activations import logits
from loraprune_ds.plan.cluster import GIB, Cluster
from loraprune_ds.plan.options import first_that_fits, larger_batches, options, settings, sizes
from loraprune_ds.plan.plan import Plan, make_plan, notes
from loraprune_ds.plan.request import Request, build_request
from loraprune_ds.plan.stages import Stage, gathered_weights
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.families import tiny_config
from tests.support.paper import PAPER
from tests.support.plan_requests import changed, with_zero
from tests.support.published import sizes_of
from tests.support.refusals import must_name

SOURCE = sizes_of("llama", 512, 1376, 6, 8, num_key_value_heads=4, vocab_size=1000)
SMALL = shape_from_config(SOURCE, "somewhere")
build_small = partial(build_request, "small", SOURCE, SMALL)
WEIGHTS = SMALL.total_numel() * 2


def request(
    cluster: Cluster, *, steps: int | None = 20, shape: ModelShape = SMALL, **train: Any
) -> Request:
    settings: dict[str, Any] = {
        "steps": steps,
        "global_batch_size": 64,
        "distill_weight": 0,
    } | train
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


def test_offload_moves_bytes_from_the_gpu_to_the_host() -> None:
    plain = request(Cluster(1, 2))
    away = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = with_zero(plain, **away)
    dense, host = make_plan(plain).stages[0], make_plan(offloaded).stages[0]
    moved = ("weights", "lora", "lora_masters", "lora_moments", "lora_gradients")
    assert not set(moved) & set(host.state)
    assert {term: host.host[term] for term in moved} == {term: dense.state[term] for term in moved}
    tight = make_plan(request(Cluster(1, 8, host_memory=8)))
    assert (tight.device_bytes <= tight.request.cluster.gpu_bytes, tight.fits) == (True, False)


def test_pinned_blocks_are_rounded_up_to_powers_of_two() -> None:
    def host(pinned: bool, shape: ModelShape = SMALL) -> dict[str, int]:
        both = {
            f"offload_{what}": {"device": "cpu", "pin_memory": pinned}
            for what in ("param", "optimizer")
        }
        return make_plan(with_zero(request(Cluster(1, 2), shape=shape), **both)).stages[0].host

    plain, pinned = host(pinned=False), host(pinned=True)
    # Pieces of the channels' linears have 512 * 1376 elements, those of embedding and head 512 * 1000, half of each on
    # a rank, in bf16: 688 and 500 KiB. All others are powers of two.
    frozen = (6 * 3 * (1024 - 688) + 2 * (512 - 500)) * 1024
    lora, gradients = (1 << (n - 1).bit_length() for n in (plain["lora"], plain["lora_gradients"]))
    rounding = frozen + lora - plain["lora"] + 2 * (gradients - plain["lora_gradients"])
    assert pinned == plain | {"pinned_rounding": rounding}
    assert plain["lora_gradients_for_the_step"] == plain["lora_gradients"]


def test_logits_are_bounded_by_their_chunk() -> None:
    small, large, larger = (
        logits(SMALL, request(Cluster(1, 1)).batch(samples, 128)) for samples in (1, 4096, 4097)
    )
    assert small == 128 * (SMALL.vocab_size * (4 + 2) + 2 * 512 * 2)
    assert larger - large == 128 * 2 * 512 * 2  # hidden states


@pytest.mark.parametrize(
    ("samples", "epochs", "steps"),
    [(1000, 2.5, 19), (1000, 0.5, 3), (128, 1, 1), (12_800, 0.29, 29)],
)
def test_epochs_have_the_steps_that_the_run_makes_of_them(
    samples: int, epochs: float, steps: int
) -> None:
    unknown = request(Cluster(1, 1), steps=None, epochs=epochs, global_batch_size=128)
    assert any("data.max_samples" in note for note in notes(make_plan(unknown)))
    planned = changed(unknown, f"data.max_samples={samples}")
    assert (planned.schedule.steps, planned.steps_known) == (steps, True)
    must_name("data.max_samples 5", changed, unknown, "data.max_samples=5")
    late = [f"train.warmup_steps={steps}", f"data.max_samples={samples}"]
    must_name("train.warmup_steps", changed, unknown, *late)


def with_hpz(tmp_path: Path, size: int | str, cluster: Cluster, **train: Any) -> Request:
    """The same run with hpZ."""
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = size
    (tmp_path / "hpz.json").write_text(json.dumps(settings))
    config = replace(request(cluster, **train).config, deepspeed=str(tmp_path / "hpz.json"))
    return build_small(config, cluster)


def test_the_search_skips_ranks_that_cannot_share_a_second_copy(tmp_path: Path) -> None:
    run = with_hpz(tmp_path, 4, Cluster(1, 4))
    build = partial(build_small, run.config)
    assert first_that_fits(build, sizes(Cluster(), 1)).request.world_size == 4
    must_name("zero_hpz_partition_size 4", first_that_fits, build, sizes(Cluster(1, 2), 1))


@pytest.mark.parametrize("family", ["nemotron_h", "stablelm"])
def test_no_layer_is_planned_below_what_a_run_keeps(family: str) -> None:
    """A router chooses more experts than would be left, and one of two kinds of heads has its own norms."""
    source = tiny_config(family).to_dict()
    config = replace(request(Cluster()).config, prune=PruneConfig(ratio=0.15, channel_multiple=1))
    asked = build_request(family, source, shape_from_config(source, family), config, Cluster(1, 1))
    layers = zip(make_plan(asked).final.counts, asked.schedule.limits.floor, strict=True)
    assert all(counts[kind] >= floor[kind] for counts, floor in layers for kind in floor)


def test_nf4_takes_half_of_int8_where_no_refit_rewrites_a_linear() -> None:
    stored = changed(request(Cluster(1, 1)), "model.frozen=nf4", "train.distill_weight=0.5")
    refitted = changed(stored, "prune.compensate=least_squares")
    rows = sum(x.numel for _, x in SMALL.linears() if not x.loses_inputs)
    columns = sum(x.numel for _, x in SMALL.linears() if x.loses_inputs)
    others = SMALL.total_numel() - rows - columns
    nf4 = 4.5 / 8  # bytes of a weight, with an fp32 scale per 64
    state = [make_plan(x).stages[0].state for x in (stored, refitted)]
    assert state[0]["weights"] == 2 * others + nf4 * (rows + columns)
    assert state[1]["weights"] == 2 * others + nf4 * rows + (1 + 2 / 64) * columns
    head = SMALL.vocab_size * SMALL.hidden_size
    teacher = 2 * (others - head) + nf4 * (rows + columns)  # no refit rewrites it
    assert [terms["teacher"] for terms in state] == 2 * [teacher]


def test_one_process_has_no_bf16_copy_of_lora_and_no_bucket() -> None:
    sharded = request(Cluster(1, 1))
    config = replace(sharded.config, deepspeed=None)
    alone = make_plan(build_small(config, Cluster(1, 1)))
    state, other = (plan.stages[0].state for plan in (alone, make_plan(sharded)))
    assert state == other | {"lora": 0, "reduce_bucket": 0}
    assert min(other["lora"], other["reduce_bucket"]) > 0
    must_name("deepspeed --gpus-per-node", build_small, config, Cluster(1, 2))


def test_nccl_takes_more_with_more_ranks() -> None:
    held = [
        Cluster(nodes, gpus).nccl_bytes for nodes, gpus in ((1, 1), (1, 2), (1, 8), (4, 8), (64, 8))
    ]
    assert held[0] == 0
    assert held[2] == pytest.approx(4.34e9)  # as published
    assert held == sorted(held)
    assert Cluster(4, 8).gpu_bytes == int(77 * GIB) - held[3]
    assert Cluster(4, 8, nccl=1).gpu_bytes == 76 * GIB


def test_what_is_gathered_is_bounded_by_the_limits_and_by_the_model() -> None:
    plain = request(Cluster(1, 2))
    layer = 2 * (SMALL.layers[0].numel + 2 * 512 + sum(SMALL.layers[0].lora_numel(8)))
    whole = WEIGHTS + 2 * sum(SMALL.lora_numel(8))
    largest = max(linear.numel for _, linear in SMALL.linears())
    assert gathered_weights(plain, SMALL) == whole + 2 * layer
    assert gathered_weights(plain, SMALL, trains=False) == 2 * layer
    for live in (SMALL.layers[0].numel // 2, 2 * SMALL.layers[0].numel):
        few = with_zero(plain, stage3_max_live_parameters=live)
        # nothing is fetched ahead of a larger module, and a parameter may exceed the limit
        beside = 2 * (live + largest) if live > SMALL.layers[0].numel else 0
        assert gathered_weights(few, SMALL) == pytest.approx(beside + 2 * layer, rel=1e-6)


def test_eager_attention_and_checkpointing_keep_what_they_change() -> None:
    plain = request(Cluster(1, 4))
    changes = ["train.gradient_checkpointing=true"], [], ["model.attn_implementation=eager"]
    plans = [make_plan(changed(plain, *overrides)) for overrides in changes]
    kept = [stage(plan, "dense").phases["training"]["activations"] for plan in plans]
    assert 2 * kept[0] < kept[1] < kept[2]


def build_like(asked: Request) -> Any:
    return lambda cluster, overrides: changed(asked, *overrides, cluster=cluster)


def test_a_run_that_does_not_fit_is_told_the_best_settings_and_the_fewest_gpus() -> None:
    asked = request(tight(2, 40), micro_batch_size=4)
    plan = make_plan(asked)
    assert not plan.fits
    best, larger = options(build_like(asked), plan)
    assert best.request.world_size == 2
    assert best.device_bytes < plan.device_bytes
    assert larger.request.world_size > 2
    assert larger.request.overrides == ()
    tried = [overrides for _, overrides in settings(asked.cluster)]
    assert tried[:2] == [(), ("train.micro_batch_size=1",)]
    assert "deepspeed=ds_configs/zero3_offload.json" in tried[-1]


def test_the_search_finds_the_fewest_gpus_that_can_split_the_batch() -> None:
    asked = with_zero(
        request(Cluster(1, 1), shape=SMALL.only([*range(len(SMALL.layers))] * 8)),
        stage3_max_live_parameters=1000,
        stage3_max_reuse_distance=0,
    )

    def build(cluster: Cluster, overrides: Sequence[str] = ()) -> Request:
        limits = asked.ds_config["zero_optimization"]
        return with_zero(changed(asked, *overrides, cluster=cluster), **limits)

    needs = {n: make_plan(build(Cluster(1, n))).device_bytes / 1e6 for n in (1, 2, 4, 8)}
    assert needs[8] < needs[4] < min(needs[1], needs[2])
    found = first_that_fits(build, sizes(tight(8, needs[4] + 1), 1))
    # micro-batches of 2 leave no 3
    assert (found.fits, found.request.world_size) == (True, 4)
    found = first_that_fits(build, sizes(tight(2, needs[4] + 1), 2))
    assert (found.request.cluster.nodes, found.request.cluster.gpus_per_node) == (2, 2)
    largest = first_that_fits(build, sizes(tight(8, 1), 512))
    # 64 samples in micro-batches of 2
    assert (largest.fits, largest.request.world_size) == (False, 32)


def test_the_largest_micro_batch_that_fits_is_proposed() -> None:
    def proposed(cluster: Cluster, **train: Any) -> int:
        asked = request(cluster, micro_batch_size=1, **train)
        return first_that_fits(
            build_like(asked), larger_batches(asked)
        ).request.config.train.micro_batch_size

    assert proposed(Cluster(1, 4)) == 16  # all of a rank's part of the batch
    needs = {
        size: make_plan(request(Cluster(1, 4), micro_batch_size=size)).device_bytes
        for size in (1, 4, 8)
    }
    assert needs[1] < needs[4] < needs[8]
    assert proposed(tight(4, (needs[4] + needs[8]) / 2e6)) == 4


def test_a_change_that_the_deepspeed_json_refuses_is_not_tried(tmp_path: Path) -> None:
    json_file = json.loads(Path("ds_configs/zero3.json").read_text())
    # of weights of one dtype
    json_file["zero_optimization"]["stage3_use_all_reduce_for_fetch_params"] = True
    (tmp_path / "one_dtype.json").write_text(json.dumps(json_file))
    cluster = tight(2, 40)
    plain = request(cluster, micro_batch_size=4).config
    asked = build_small(replace(plain, deepspeed=str(tmp_path / "one_dtype.json")), cluster)
    points = (
        (cluster, (override,)) for override in ("model.frozen=int8", "train.micro_batch_size=1")
    )
    assert first_that_fits(build_like(asked), points).request.config.model.frozen is None


def test_a_micro_batch_that_the_config_refuses_is_not_proposed() -> None:
    """Flash attention packs samples only one at a time."""
    plain = request(Cluster(1, 2), micro_batch_size=1).config
    data = DataConfig(format="chat", packing=True, window=64)
    flash = replace(plain, data=data, model=ModelConfig(attn_implementation="flash_attention_2"))
    asked = build_small(flash, Cluster(1, 2))
    found = first_that_fits(build_like(asked), larger_batches(asked))
    assert found.request.overrides == ("train.micro_batch_size=1",)


def test_only_rows_that_are_packed_need_a_family_that_packs() -> None:
    source = tiny_config("lfm2").to_dict()
    given = "lfm2", source, shape_from_config(source, "lfm2")
    prune = PruneConfig(ratio=0.3, channel_multiple=1)
    text = replace(request(Cluster(1, 2)).config, prune=prune, data=DataConfig(packing=True))
    build_request(*given, text, Cluster(1, 2))
    chats = replace(text, data=replace(text.data, format="chat"))
    must_name("data.packing lfm2", build_request, *given, chats, Cluster(1, 2))


def test_a_cut_moves_a_layer_with_two_shards_of_it() -> None:
    """Parts and the buffer that leaves, then what arrives, then new shards. Nothing moves that is gone."""
    plan = make_plan(request(Cluster(1, 2)))
    moving = stage(plan, "the first cut").phases["moving"]["repartition"]
    cut = [new for new, old in zip(plan.after.layers, SMALL.layers, strict=True) if new != old]
    assert 0 < len(cut) < len(SMALL.layers)
    largest = max(sum(x.numel for x in layer.tensors) for layer in cut)
    assert moving == 2 * 2 * largest // 2


def test_a_refit_costs_memory_and_disk() -> None:
    plain = request(Cluster(1, 2), steps=40, global_batch_size=16)
    without, refit = (
        make_plan(changed(plain, f"prune.compensate={x}")) for x in ("none", "least_squares")
    )
    assert refit.stages[0] == without.stages[0]  # between cuts it costs nothing
    phases = refit.stages[1].phases
    # Ten tokens for each of 1,376 inputs are 14 steps of 16 windows of 64. A token has embeddings, hidden states and
    # rotary angles in bf16
    assert phases["refit"]["hidden_states"] == 14 * 16 * 64 // 2 * 2 * 2 * (512 + 64)
    assert (
        phases["refit"]["refit"] > 4 * 1376**2 + 20 * refit.after.layers[1].linears[-1].inputs ** 2
    )
    assert phases["repeated passes"]["input_moments"] > 4 * (1376**2 + 512**2)
    columns = [x.numel for _, x in refit.after.linears() if x.loses_inputs]
    assert refit.checkpoint_bytes > without.checkpoint_bytes + sum(columns[2:-2])


def test_hpz_groups_are_whole_nodes(tmp_path: Path) -> None:
    automatic = with_hpz(tmp_path, "auto", Cluster(1, 4))
    sizes_on_two = [
        changed(automatic, cluster=Cluster(2, n)).fetch.zero_hpz_partition_size for n in (2, 8)
    ]
    assert sizes_on_two == [2, 8]
    must_name(
        "zero_hpz_partition_size 4 6", with_hpz, tmp_path, 4, Cluster(2, 6), global_batch_size=24
    )
