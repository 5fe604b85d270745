"""DeepSpeed's JSON: "auto" is filled in, and a setting that cannot work is refused by name before anything starts."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from loraprune_ds.config import ModelConfig, RunConfig, TrainConfig
from loraprune_ds.config_types import Dtype, Frozen
from loraprune_ds.engine.ds_config import (
    HPZ,
    MAX_BUCKET,
    OWNED,
    REFUSED,
    ZeroSettings,
    bucket_numel,
    resolve_ds_config,
)
from loraprune_ds.engines import deepspeed_sections
from loraprune_ds.errors import UserError
from loraprune_ds.model.classes import causal_lm_class
from loraprune_ds.model.experts import CORRECTION
from loraprune_ds.model.shape import ModelShape
from loraprune_ds.pretrained.read_shape import shape_from_config
from tests.support.families import MIXTURES, tiny_config
from tests.support.launching import ROOT
from tests.support.refusals import must_name
from tests.support.shapes_and_scores import LLAMA_7B, make_shape

SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
SHAPE = make_shape([(4, 40)] * 3)
CONFIG = RunConfig(
    "out", train=TrainConfig(steps=1, global_batch_size=24, micro_batch_size=2, max_grad_norm=0.5)
)


def resolve(
    tmp_path: Path,
    raw: dict[str, Any],
    config: RunConfig = CONFIG,
    world_size: int = 3,
    shape: ModelShape = SHAPE,
) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(raw))
    return resolve_file(path, config, world_size, shape)


def resolve_file(
    path: Path, config: RunConfig, world_size: int, shape: ModelShape = SHAPE
) -> dict[str, Any]:
    config = replace(config, deepspeed=str(path))
    return resolve_ds_config(config, shape, deepspeed_sections(), world_size, 2)


def with_dtype(dtype: Dtype, frozen: Frozen | None = None) -> RunConfig:
    return RunConfig("out", model=ModelConfig(dtype=dtype, frozen=frozen), train=CONFIG.train)


def zero3(**settings: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3, **settings}}


def place(keys: tuple[str, ...], value: Any) -> dict[str, Any]:
    raw = zero3()
    section = raw
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
    return raw


def check(tmp_path: Path, raw: dict[str, Any], names: str) -> None:
    must_name(f"{tmp_path / 'ds.json'} {names}", resolve, tmp_path, raw)


@pytest.mark.parametrize("given", ["auto", None], ids=["auto", "absent"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_run_fills_in_its_settings(tmp_path: Path, dtype: Dtype, given: str | None) -> None:
    raw = zero3()
    if given:
        raw |= dict.fromkeys(
            ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"), given
        )
        raw |= {
            "bf16": {"enabled": given},
            "fp16": {"enabled": given},
            "communication_data_type": given,
        }
        raw["zero_optimization"] |= {
            "reduce_bucket_size": given,
            "stage3_prefetch_bucket_size": given,
        }
    resolved = resolve(tmp_path, raw, with_dtype(dtype))
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert resolved["gradient_accumulation_steps"] == 4
    assert resolved["gradient_clipping"] == 0.5
    assert (resolved["bf16"], resolved["fp16"]) == (
        {"enabled": dtype == "bfloat16"},
        {"enabled": dtype == "float16"},
    )
    assert resolved["communication_data_type"] == "fp32"
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    # it waits for the device at every forward pass
    assert resolved["timers"] == {"throughput": {"enabled": False}}
    assert resolved["zero_optimization"]["reduce_bucket_size"] == bucket_numel(SHAPE, 8)
    # two of the largest linears
    assert resolved["zero_optimization"]["stage3_prefetch_bucket_size"] == 2 * 40 * 16


def test_settings_that_change_no_result_stay(tmp_path: Path) -> None:
    raw = zero3(sub_group_size=1000, reduce_bucket_size=77) | {"fp16": {"initial_scale_power": 8}}
    raw |= {"timers": {"throughput": {"enabled": True}}, "wall_clock_breakdown": True}
    resolved = resolve(tmp_path, raw, with_dtype("float16"))
    assert resolved["fp16"] == {"initial_scale_power": 8, "enabled": True}
    assert resolved["zero_optimization"] == raw["zero_optimization"] | {
        "stage3_prefetch_bucket_size": 2 * 40 * 16
    }
    assert {key: resolved[key] for key in ("timers", "wall_clock_breakdown")}.items() <= raw.items()


@pytest.mark.parametrize("section", [None, True, {}, {"stage": 2}])
def test_all_but_stage_3_is_refused(tmp_path: Path, section: Any) -> None:
    raw = {} if section is None else {"zero_optimization": section}
    check(tmp_path, raw, "zero_optimization.stage 3")


OFFLOAD = {"device": "cpu", "ratio": 0.5}


# A setting, its value, and what else the line names.
@pytest.mark.parametrize(
    ("setting", "value", "names"),
    [
        # unknown keys, and values that have no meaning
        ("gradient_cliping", 1.0, "gradient_clipping"),
        ("wall_clock_breakdown", "yes", "'yes'"),
        ("disable_python_gc", 1, "1"),
        ("steps_per_print", "never", "'never'"),
        ("steps_per_print", 0, "0"),
        ("zero_optimization.reduce_bucket_size", -1, "-1"),
        ("fp16.loss_scal", 2, "2"),
        ("bf16", True, "True"),
        # contradictions to the run config
        ("train_batch_size", 32, "32 24"),
        ("gradient_clipping", 1.0, "1.0 0.5"),
        ("bf16.enabled", False, "False True"),
        ("data_types.grad_accum_dtype", "bf16", "bf16"),
        ("zero_optimization.stage3_max_live_parameters", "auto", '"auto"'),
        # forms of offload that cannot be cut
        ("zero_optimization.offload_optimizer.device", "nvme", "nvme"),
        ("zero_optimization.offload_param.device", "nvme", "nvme"),
        ("zero_optimization.offload_optimizer", OFFLOAD, ".ratio 0.5"),
        ("zero_optimization.offload_optimizer.ratio", 0, "0"),
        ("zero_optimization.offload_optimizer.ratio", {"enabled": True}, "enabled"),
        ("zero_optimization.offload_optimizer.super_offload", True, ""),
        # hpZ over unequal groups
        ("zero_optimization.zero_hpz_partition_size", 0, "0"),
        ("zero_optimization.zero_hpz_partition_size", 2, "2 3"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_name(
    tmp_path: Path, setting: str, value: Any, names: str
) -> None:
    check(tmp_path, place(tuple(setting.split(".")), value), f"{setting} {names}")


@pytest.mark.parametrize("key", [*REFUSED, *OWNED])
def test_every_setting_of_the_tables_is_refused(tmp_path: Path, key: str) -> None:
    for value in ({"device": "cpu"}, {"enabled": True}, {}, 2, "auto"):
        check(tmp_path, place(tuple(key.split(".")), value), key)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("train_batch_size",), 24),
        (("zero_optimization", "offload_param"), {"device": "cpu"}),
        (("zero_optimization", "offload_optimizer"), {"device": "cpu", "pin_memory": True}),
        (("zero_optimization", "offload_optimizer"), None),
        (("zero_optimization", "stage3_module_granularity_threshold"), 0),
        (("zero_optimization", "zero_hpz_partition_size"), 3),
        (("zero_optimization", "zero_hpz_partition_size"), "3"),
        (("gradient_predivide_factor",), 1.0),
        (("prescale_gradients",), False),
        (("torch_autocast",), {"enabled": False}),
    ],
    ids=str,
)
def test_a_setting_that_is_off_or_works_is_accepted(
    tmp_path: Path, keys: tuple[str, ...], value: Any
) -> None:
    resolve(tmp_path, place(keys, value))


def test_hpz_is_for_several_nodes_alone_and_for_who_asks(tmp_path: Path) -> None:
    def size(world_size: int, **settings: str) -> int | None:
        resolved = resolve(tmp_path, zero3(**settings), world_size=world_size)
        return resolved["zero_optimization"].get(HPZ)

    assert [size(ranks, **{HPZ: "auto"}) for ranks in (1, 2, 4)] == [1, 1, 2]  # two on each node
    assert size(4) is None


ALL_REDUCE = [
    ("zero_optimization", f"{stage}use_all_reduce_for_fetch_params") for stage in ("stage3_", "")
]


@pytest.mark.parametrize("keys", ALL_REDUCE, ids=".".join)
@pytest.mark.parametrize(("dtype", "sizes"), [("bfloat16", "1 and 2"), ("float32", "1 and 4")])
def test_int8_is_not_fetched_by_all_reduce(
    tmp_path: Path, keys: tuple[str, ...], dtype: Dtype, sizes: str
) -> None:
    resolve(tmp_path, place(keys, True), with_dtype(dtype))
    resolve(tmp_path, place(keys, False), with_dtype(dtype, "int8"))
    given = (tmp_path, place(keys, True), with_dtype(dtype, "int8"))
    must_name(f"{'.'.join(keys)} {sizes}", resolve, *given)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_with_tensors_in_fp32_is_not_either(tmp_path: Path, family: str) -> None:
    config = tiny_config(family)
    shape, raw = shape_from_config(config.to_dict(), family), place(ALL_REDUCE[0], True)
    with torch.device("meta"):
        stock = causal_lm_class(family)._from_config(config)
    kept = (CORRECTION, "expert_bias", "wg.weight", "A_log")  # of routers, and of a delta net
    corrected = any(name.endswith(kept) for name in stock.state_dict())
    resolve(tmp_path, raw, with_dtype("float32"), shape=shape)
    with pytest.raises(UserError, match=ALL_REDUCE[0][1]) if corrected else nullcontext():
        resolve(tmp_path, raw, with_dtype("bfloat16"), shape=shape)


@pytest.mark.parametrize(
    "text", ["{", '{"bf16": {}, "zero_optimization": {"stage": 3}, "bf16": {}}', None]
)
def test_a_file_that_is_not_a_json_object(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "ds.json").write_text(text)
    names = f"{tmp_path / 'ds.json'} {'bf16' if text and 'bf16' in text else ''}"
    must_name(names, resolve_file, tmp_path / "ds.json", CONFIG, 1)


def test_the_gradient_bucket_holds_all_of_lora_or_one_layer() -> None:
    assert bucket_numel(SHAPE, 8) == 3 * 8 * (4 * (16 + 16) + 3 * (16 + 40))
    assert bucket_numel(LLAMA_7B, 64) == MAX_BUCKET
    huge = make_shape([(64, 28672)] * 2, hidden=8192, head_dim=128)
    assert bucket_numel(huge, 512) == 512 * (4 * 2 * 8192 + 3 * (8192 + 28672)) > MAX_BUCKET


@pytest.mark.parametrize(
    "settings", [{}, *(json.loads(path.read_text())["zero_optimization"] for path in SHIPPED)]
)
def test_a_plan_without_deepspeed_reads_what_deepspeed_reads(settings: dict[str, Any]) -> None:
    settings = {key: value for key, value in settings.items() if value != "auto"}
    own, theirs = ZeroSettings(**settings), DeepSpeedZeroConfig(**settings)
    assert own.model_dump() == {name: getattr(theirs, name) for name in ZeroSettings.model_fields}
