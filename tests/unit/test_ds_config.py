"""DeepSpeed's JSON. "auto" is filled in, and what cannot work is refused by name before anything starts."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraprune_ds.config import Dtype, LoraConfig, ModelConfig, RunConfig, TrainConfig
from loraprune_ds.config_file import load_config
from loraprune_ds.errors import UserError
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.read_shape import shape_from_config
from loraprune_ds.model.shapes import ModelShape
from loraprune_ds.zero.ds_config import MAX_BUCKET, ONE_DTYPE, OWNED, REFUSED, bucket_numel, resolve_ds_config
from tests.families import MIXTURES, tiny_config
from tests.unit.shapes_and_scores import LLAMA_7B, SMOLLM2, make_shape, repository

SHIPPED = sorted((repository() / "ds_configs").glob("*.json"))
SHAPE = make_shape([(4, 40)] * 3)
CONFIG = RunConfig("out", train=TrainConfig(steps=1, global_batch_size=24, micro_batch_size=2, max_grad_norm=0.5))


def resolve(
    tmp_path: Path, raw: dict[str, Any], config: RunConfig = CONFIG, world_size: int = 3, shape: ModelShape = SHAPE
) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw))
    return resolve_ds_config(path, config, shape, world_size)


def with_dtype(dtype: Dtype) -> RunConfig:
    return RunConfig("out", model=ModelConfig(dtype=dtype), train=CONFIG.train)


def zero3(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **settings}}


def refused(tmp_path: Path, raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, raw)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'ds.json'}: ")
    return message.removeprefix(f"{tmp_path / 'ds.json'}: ")


def values(tree: Any) -> list[Any]:
    return [v for item in tree.values() for v in values(item)] if isinstance(tree, dict) else [tree]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_resolve(path: Path) -> None:
    for shape in (SMOLLM2, LLAMA_7B):
        resolved = resolve_ds_config(path, CONFIG, shape, 2)
        assert "auto" not in values(resolved)
        assert resolved["zero_optimization"]["stage"] == 3


def test_shipped_runs_resolve_on_eight_ranks() -> None:
    for path in (repository() / "launch" / "configs").glob("llama-*.yaml"):
        config = load_config(path)
        resolved = resolve_ds_config(repository() / config.deepspeed, config, LLAMA_7B, 8)
        assert resolved["train_batch_size"] == 128
        assert resolved["bf16"]["enabled"] is True


@pytest.mark.parametrize("given", ["auto", None], ids=["auto", "absent"])
def test_the_run_config_fills_in_what_it_owns(tmp_path: Path, given: str | None) -> None:
    raw = zero3()
    if given:
        raw |= dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), given)
        raw |= {"bf16": {"enabled": given}, "fp16": {"enabled": given}, "communication_data_type": given}
        raw["zero_optimization"] |= {"reduce_bucket_size": given, "stage3_prefetch_bucket_size": given}
    resolved = resolve(tmp_path, raw)
    assert resolved["train_batch_size"] == 24
    assert resolved["train_micro_batch_size_per_gpu"] == 2
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 0.5
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["fp16"] == {"enabled": False}
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert resolved["zero_optimization"]["reduce_bucket_size"] == bucket_numel(SHAPE, 8)
    assert resolved["zero_optimization"]["stage3_prefetch_bucket_size"] == 2 * 40 * 16  # two of the largest linears


@pytest.mark.parametrize(
    ("dtype", "bf16", "fp16"), [("bfloat16", True, False), ("float16", False, True), ("float32", False, False)]
)
def test_precision_follows_the_models_dtype(tmp_path: Path, dtype: Dtype, bf16: bool, fp16: bool) -> None:
    resolved = resolve(tmp_path, zero3(), with_dtype(dtype))
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (bf16, fp16)


def test_a_loss_scale_and_other_settings_of_deepspeeds_own_stay(tmp_path: Path) -> None:
    raw = zero3(sub_group_size=1000, reduce_bucket_size=77) | {
        "fp16": {"initial_scale_power": 8},
        "wall_clock_breakdown": True,
    }
    resolved = resolve(tmp_path, raw, with_dtype("float16"))
    assert resolved["fp16"] == {"initial_scale_power": 8, "enabled": True}
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 77  # changes speed, not results
    assert resolved["zero_optimization"]["sub_group_size"] == 1000
    assert resolved["wall_clock_breakdown"] is True


def test_a_batch_that_does_not_fit_the_ranks_lists_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be split over 5 ranks; world sizes that fit: 1, 2, 3, 4, 6, 12$"):
        resolve(tmp_path, zero3(), world_size=5)


# What is refused


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gradient_cliping": 1.0}, "gradient_cliping is not a setting that a run takes; it takes bf16, "),
        ({"wandb": {"enabled": True}}, "wandb is not a setting that a run takes"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown must be true or false, got 'yes'"),
        ({"steps_per_print": "never"}, "steps_per_print must be a whole number above 0, got 'never'"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning: the run config owns the data"),
    ],
    ids=str,
)
def test_what_deepspeed_would_ignore_or_fail_on_later(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, zero3() | setting).startswith(message)


@pytest.mark.parametrize(
    "raw",
    [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 2}}, {"zero_optimization": True}, {"zero": 3}],
    ids=str,
)
def test_only_zero3(tmp_path: Path, raw: dict[str, Any]) -> None:
    assert refused(tmp_path, raw) == "zero_optimization.stage must be 3"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but the run config makes it 24; write "),
        ({"train_micro_batch_size_per_gpu": 1}, "train_micro_batch_size_per_gpu is 1, but"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, but the run config makes it 4"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but the run config makes it 0.5"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but the run config makes it True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but the run config makes it False"),
        ({"communication_data_type": "bf16"}, "communication_data_type is bf16, but the run config makes it fp32"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "data_types.grad_accum_dtype is bf16, but"),
        ({"bf16": True}, "bf16 must be a section of keys, got True"),
        ({"data_types": "fp32"}, "data_types must be a section of keys, got 'fp32'"),
    ],
    ids=str,
)
def test_fighting_the_run_config(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, zero3() | setting).startswith(message)


def test_agreeing_with_the_run_config_is_no_fight(tmp_path: Path) -> None:
    resolve(tmp_path, zero3() | {"train_batch_size": 24, "gradient_clipping": 0.5, "bf16": {"enabled": True}})


def place(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    raw = zero3()
    section = raw
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
    return raw


@pytest.mark.parametrize("keys", REFUSED | OWNED, ids=".".join)
def test_what_does_not_go_with_a_cut_is_refused_by_name(tmp_path: Path, keys: tuple[str, ...]) -> None:
    for value in ({"device": "cpu"}, {"enabled": True}, {}, 2, "auto"):
        assert refused(tmp_path, place(keys, value)).startswith(f"{'.'.join(keys)}: ")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("zero_optimization", "offload_param"), {"device": "none"}),
        (("zero_optimization", "offload_param"), {"device": "cpu"}),
        (("zero_optimization", "offload_optimizer"), {"device": "cpu", "pin_memory": True}),
        (("zero_optimization", "offload_optimizer"), None),
        (("zero_optimization", "stage3_module_granularity_threshold"), 0),
        (("gradient_predivide_factor",), 1.0),
        (("prescale_gradients",), False),
        (("zero_optimization", "zero_quantized_weights"), False),
        (("torch_autocast",), {"enabled": False}),
        (("elasticity",), {"enabled": False}),
    ],
    ids=str,
)
def test_a_setting_that_is_off_or_works_is_no_fault(tmp_path: Path, keys: tuple[str, ...], value: Any) -> None:
    resolve(tmp_path, place(keys, value))


@pytest.mark.parametrize(
    ("section", "key", "value", "why"),
    [
        ("offload_optimizer", "device", "nvme", "masters and moments on NVMe are not in memory when they are cut"),
        ("offload_param", "device", "nvme", "weights on NVMe are not in memory when they are cut; use cpu"),
        ("offload_optimizer", "ratio", 0.5, "a part of the optimizer on the host needs DeepSpeedCPUAdam"),
        ("offload_optimizer", "super_offload", True, "SuperOffload has its own optimizer"),
    ],
)
def test_a_kind_of_offload_that_cannot_work(tmp_path: Path, section: str, key: str, value: Any, why: str) -> None:
    raw = zero3(**{section: {"device": "cpu", key: value}})
    assert refused(tmp_path, raw).startswith(f"zero_optimization.{section}.{key} {value}: {why}")


@pytest.mark.parametrize("key", [".".join(keys) for keys in ONE_DTYPE])
@pytest.mark.parametrize(("dtype", "sizes"), [("bfloat16", "1 and 2"), ("float32", "1 and 4")])
def test_int8_is_not_fetched_by_all_reduce(tmp_path: Path, key: str, dtype: Dtype, sizes: str) -> None:
    raw = place(tuple(key.split(".")), True)
    resolve(tmp_path, raw, with_dtype(dtype))
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, raw, with_dtype(dtype), shape=replace(SHAPE, int8=True))
    reason = f"an all-reduce fetches weights in one buffer, but these have elements of {sizes} bytes"
    assert str(caught.value) == f"{tmp_path / 'ds.json'}: {key}: {reason}"


@pytest.mark.parametrize("family", MIXTURES)
def test_nor_is_a_router_with_an_fp32_correction(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    shape, raw = shape_from_config(config.to_dict(), family), place(ONE_DTYPE[0], True)
    with torch.device("meta"):
        corrected = any(CORRECTION in name for name, _ in AutoModelForCausalLM.from_config(config).named_buffers())
    resolve(tmp_path, raw, with_dtype("float32"), shape=shape)
    refuses = pytest.raises(UserError, match=r"elements of 2 and 4 bytes$") if corrected else nullcontext()
    with refuses:
        resolve(tmp_path, raw, with_dtype("bfloat16"), shape=shape)


def test_all_reduce_is_no_fault_where_it_is_off(tmp_path: Path) -> None:
    resolve(tmp_path, place(ONE_DTYPE[0], False), shape=replace(SHAPE, int8=True))


@pytest.mark.parametrize("size", [1, 3, "3"])
def test_hpz_goes_over_equal_groups_of_ranks(tmp_path: Path, size: int | str) -> None:
    resolve(tmp_path, zero3(zero_hpz_partition_size=size))


@pytest.mark.parametrize("size", [0, 2, 4, 6])
def test_hpz_over_unequal_groups_is_refused(tmp_path: Path, size: int) -> None:
    message = refused(tmp_path, zero3(zero_hpz_partition_size=size))
    assert message.startswith(f"zero_optimization.zero_hpz_partition_size is {size}, which does not divide 3 ranks")


def test_deepspeeds_throughput_timer_is_off_unless_the_json_turns_it_on(tmp_path: Path) -> None:
    """It waits for the device at every forward pass."""
    assert resolve(tmp_path, zero3())["timers"]["throughput"] == {"enabled": False}
    on = {"timers": {"throughput": {"enabled": True}}}
    assert resolve(tmp_path, zero3() | on)["timers"]["throughput"] == {"enabled": True}


def test_an_auto_that_nobody_owns_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, zero3(stage3_max_live_parameters="auto"))
    assert message == (
        'zero_optimization.stage3_max_live_parameters is "auto" but the run config does not own it; give a value'
    )
    assert refused(tmp_path, zero3() | {"steps_per_print": "auto"}).startswith('steps_per_print is "auto"')


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (zero3(stage3_prefetch_bucket=5), "zero_optimization.stage3_prefetch_bucket: Extra inputs are not permitted"),
        (zero3(reduce_bucket_size=-1), "zero_optimization.reduce_bucket_size: Input should be greater than 0"),
        (zero3() | {"fp16": {"loss_scal": 2}}, "fp16.loss_scal: Extra inputs are not permitted, got 2"),
        (zero3() | {"timers": {"throughput": {"on": True}}}, "timers.throughput.on: Extra inputs are not permitted"),
    ],
    ids=["mistyped", "negative", "mistyped fp16", "mistyped timer"],
)
def test_what_deepspeed_does_not_know_is_found_at_once(tmp_path: Path, raw: dict[str, Any], message: str) -> None:
    assert refused(tmp_path, raw).startswith(message)


TWICE = '{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}, "bf16": {"enabled": false}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "must hold a JSON object"), (TWICE, "is not valid JSON: bf16 is given twice")],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve_ds_config(tmp_path / "ds.json", CONFIG, SHAPE, 1)
    with pytest.raises(UserError, match=r"nowhere\.json does not exist"):
        resolve_ds_config(tmp_path / "nowhere.json", CONFIG, SHAPE, 1)


def test_the_gradient_bucket_holds_all_of_lora_or_one_layer() -> None:
    per_layer = LoraConfig().r * (4 * (16 + 16) + 3 * (16 + 40))
    assert bucket_numel(SHAPE, LoraConfig().r) == 3 * per_layer
    assert bucket_numel(LLAMA_7B, 8) == 19_988_480
    assert bucket_numel(LLAMA_7B, 64) == MAX_BUCKET
    huge = make_shape([(64, 28672)] * 2, hidden=8192, head_dim=128)
    assert bucket_numel(huge, 512) == 512 * (4 * 2 * 8192 + 3 * (8192 + 28672)) > MAX_BUCKET
