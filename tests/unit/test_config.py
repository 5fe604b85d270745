"""A run config is accepted, or refused in one line that names the key."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from loraprune_ds.config import PruneConfig, RunConfig, TrainConfig
from loraprune_ds.config_file import config_from_dict, config_value, read_config
from tests.support.launching import ROOT
from tests.support.refusals import must_name, refused

BASE = "output_dir: out\ntrain: {steps: 100}\n"
PACKED_BY_FLASH = (
    "data: {format: chat, packing: true}\nmodel: {attn_implementation: flash_attention_2}"
)
SHIPPED = sorted((ROOT / "launch" / "configs").rglob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return config_from_dict(read_config(path, overrides))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load_and_a_resolved_one_reads_back_as_itself(
    path: Path, tmp_path: Path
) -> None:
    overrides = ["train.adam_epsilon=1e-9", "prune.normalize=none", "model.revision='1'"]
    config = config_from_dict(read_config(path, overrides))
    assert load(tmp_path, yaml.safe_dump(config.to_dict())) == config
    assert config.deepspeed is None or (ROOT / config.deepspeed).is_file()
    assert config.output_dir == f"runs/{path.stem}"


# Types


def test_every_number_may_be_a_string(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as one."""
    config = load(tmp_path, BASE, "train.learning_rate=1e-4", "prune.head_ratio=0.5")
    assert config.train.learning_rate == 1e-4
    assert type(load(tmp_path, BASE, "train.max_grad_norm=0").train.max_grad_norm) is float
    raw = config.to_dict()
    for section in (section for section in raw.values() if isinstance(section, dict)):
        section |= {key: str(value) for key, value in section.items() if isinstance(value, float)}
    assert load(tmp_path, yaml.safe_dump(raw)) == config


WRONG = """
seed=1.5 seed=-1 seed=4294967296 seed=2024-01-01 model=embedded model.path=7 model.dtype=x lora.r=0 lora.lora_alpha=0
lora.lora_dropout=1 data.path=7 data.window=1 data.format=csv data.held_out_fraction=1 data.max_samples=0 data.packing=1
prune.ratio=0 prune.ratio=1 prune.ratio=.nan prune.head_ratio=1 prune.criterion=taylor prune.ranking=local
prune.normalize=max prune.moving_average=1 prune.prune_every=0 prune.channel_multiple=0
prune.protected_first=-1 prune.protected_last=-1
prune.warmup_fraction=1 prune.warmup_fraction=0.9 prune.compensate=mean
prune.target=0 prune.target=much prune.target=-4B
train.steps=0 train.steps=ten train.steps=10.0 train.steps=true train.epochs=0 train.recovery_steps=-1
train.distill_weight=1.5 train.distill_weight=-1 train.learning_rate=0
train.learning_rate=101 train.learning_rate=fast train.learning_rate=true train.learning_rate=null
train.learning_rate=[1] train.learning_rate=.inf train.lr_scheduler=step train.warmup_steps=-1
train.warmup_steps=100 train.max_grad_norm=-1 train.adam_epsilon=0 train.micro_batch_size=0
train.global_batch_size=0 train.global_batch_size=9
evaluate.window=1 evaluate.max_windows=0 evaluate.batch_size=0 evaluate.every=0 checkpoint.every=0
checkpoint.keep_last=0
""".split()


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_names_the_key(tmp_path: Path, override: str) -> None:
    assert refused(load, tmp_path, BASE, override).startswith(f"{override.partition('=')[0]} ")


def test_a_value_at_the_edge_of_its_range(tmp_path: Path) -> None:
    prune = "{head_ratio: 0, moving_average: 0, protected_first: 0, protected_last: 0}"
    train = "{steps: 1, learning_rate: 100, max_grad_norm: 0, distill_weight: 1}"
    data = "{window: 2, max_samples: 1}"
    load(
        tmp_path,
        f"output_dir: out\nseed: 4294967295\nprune: {prune}\ntrain: {train}\ndata: {data}\n",
    )


def test_a_file_takes_the_place_of_the_part_that_is_held_out(tmp_path: Path) -> None:
    assert (
        load(tmp_path, "output_dir: out\ndata: {held_out: text.txt}\n").data.held_out_fraction
        is None
    )


@pytest.mark.parametrize("setting", ["prune.target_context=3", "prune.target_weight_bits=3"])
def test_a_setting_that_nothing_reads_is_named(tmp_path: Path, setting: str) -> None:
    must_name(setting.partition("=")[0], load, tmp_path, BASE, setting)
    load(tmp_path, BASE, setting, "prune.target=24GiB")


MIXED = "[my.txt, {path: my.jsonl, format: chat}]"


@pytest.mark.parametrize(("path", "packs"), [("my.txt", False), (MIXED, True)])
def test_packing_does_nothing_where_all_data_is_text(path: str, packs: bool) -> None:
    """The quickstart packs its chats. A user's own text is the second thing to try."""
    raw = read_config("launch/configs/quickstart.yaml", [f"data.path={path}"])
    data = config_from_dict(raw).data
    assert (data.packing, data.packs_rows) == (True, packs)


# Keys and files


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    message = refused(load, tmp_path, "output_dir: out\nprune: {sparsity: 0.5}\n")
    assert message.startswith("unknown key prune.sparsity; known keys there: ratio, target, ")
    known = message.split(": ", 1)[1].split(", ")
    assert known == [f.name for f in dataclasses.fields(PruneConfig)]
    for key in ("prunning", "1"):  # told before the missing output_dir
        message = refused(load, tmp_path, f"{key}:\n")
        assert message.startswith(f"unknown key {key}; known keys there: output_dir, seed, ")
    must_name("output_dir", load, tmp_path, "seed: 1")
    must_name(str(tmp_path), read_config, tmp_path)  # a folder


@pytest.mark.parametrize(
    ("setting", "instead"),
    [
        ("model.drop_layers=[]", "launch/examples/drop_layers.py"),
        ("prune.depth_ratio=0.1", "launch/examples/drop_layers.py"),
        ("prune.compensate_steps=4", "remove passes"),
        ("prune.compensate_decay=0.5", "remove passes"),
    ],
)
def test_a_removed_key_says_what_to_do_instead(tmp_path: Path, setting: str, instead: str) -> None:
    """Also at its default, which only files of earlier runs may have."""
    must_name(f"{setting.partition('=')[0]} {instead}", load, tmp_path, BASE, setting)


# --set


def test_overrides(tmp_path: Path) -> None:
    text = "output_dir: out\nmodel:\nprune: {ratio: 0.5}\ntrain: {steps: 3}\n"
    given = [
        "prune.ratio=0.2",
        "data.path=a=b.txt",
        "data.input_field=null",
        "model.path=folder",
        "prune.ratio=0.3",
    ]
    config = load(tmp_path, text, *given)
    assert config.prune.ratio == 0.3  # the last one counts
    # only the first = separates
    assert (config.data.path, config.data.input_field) == ("a=b.txt", None)
    assert config.model.path == "folder"  # in a section that the file has left empty
    for wrong in ("prune.ratio", "prune.ratio.x=1", "prune.ratio=["):
        must_name(f"--set {wrong.partition('=')[0]}", load, tmp_path, text, wrong)
    must_name("prune.ratoi ratio", load, tmp_path, text, "prune.ratoi=0.5")
    must_name("prune.ratio prune.target", load, tmp_path, text, "prune.ratio=")


def test_a_value_can_be_asked_for(tmp_path: Path) -> None:
    config = load(tmp_path, "output_dir: runs/mine\nprune: {ratio: 0.4}", "prune.ratio=0.3")
    assert config_value(config, "output_dir") == "runs/mine"
    assert config_value(config, "prune.ratio") == 0.3
    for key in ("prune", "prune.rate", "output_dir.x", "x", ""):
        assert refused(config_value, config, key) == f"the config has no value {key}"


# The global batch is the unit


def test_accumulation_follows_from_the_ranks() -> None:
    train = TrainConfig(steps=1, global_batch_size=24, micro_batch_size=2)
    assert [train.gradient_accumulation_steps(w) for w in (1, 2, 3, 4, 6, 12)] == [
        12,
        6,
        4,
        3,
        2,
        1,
    ]
    for world_size in (5, 7, 8, 24):
        message = refused(train.gradient_accumulation_steps, world_size)
        assert f"24 in micro-batches of 2 cannot be split over {world_size} ranks" in message
        assert message.endswith("world sizes that fit: 1, 2, 3, 4, 6, 12")


@pytest.mark.parametrize("target", ["4.5B", "4500000000", "4_500_000_000", "4500M"])
def test_a_target_takes_the_place_of_the_ratio(tmp_path: Path, target: str) -> None:
    config = load(tmp_path, f"output_dir: out\nprune: {{target: {target}}}")
    assert config.prune.ratio is None
    assert config.prune.target_amount is not None
    assert config.prune.target_amount.value == 4.5e9
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("data: {path: [{path: a}], format: csv}", "data.format csv"),
        ("train: {steps: 3, recovery_steps: [1, 2]}", "train.recovery_steps [1, 2]"),
        ("prune: {sizes: [0.2, 0.4]}", "prune.sizes second run export"),
        ("evaluate: {after: [piqa, 5]}", "evaluate.after[1] 5"),
        ("logging: {report_to: [paper]}", "logging.report_to[0] paper"),
        ("prune: {ratio: 0.4, target: 4B}", "prune.ratio prune.target"),  # exactly one of two
        ("train: {steps: 3, epochs: 1}", "train.steps train.epochs"),
        ("train: {global_batch_size: 4}", "train.steps train.epochs"),
        ("train: {steps: 1, group_by_length: true}", "train.group_by_length data.format"),
        (PACKED_BY_FLASH, "data.packing model.attn_implementation train.micro_batch_size"),
        (
            "data: {held_out: text.txt, held_out_fraction: 0.1}",
            "data.held_out data.held_out_fraction",
        ),
        ("data: {held_out_fraction: null}", "data.held_out data.held_out_fraction"),
        ("2024-01-01: 3", "config"),
        ("deepspeed:\nmodel: {dtype: float16}", "model.dtype float16 deepspeed"),
        ('model: {path: "\\uD800"}', "Unicode"),
        ("[1, 2]", "run.yaml"),
        ("", "run.yaml"),
        ("a: [", "run.yaml YAML"),
        ("train: {learning_rate: 1e-3}\ntrain: {steps: 5}", "run.yaml train"),
    ],
)
def test_the_place_of_a_wrong_value_is_named(tmp_path: Path, given: str, names: str) -> None:
    must_name(names, load, tmp_path, given, "output_dir=out")


def test_an_empty_section_keeps_its_defaults(tmp_path: Path) -> None:
    empty = "".join(f"{field.name}:\n" for field in dataclasses.fields(RunConfig)[3:])
    given = empty.replace("prune:\n", "prune:\n  ratio: 0.25\n")
    assert load(tmp_path, f"output_dir: out\n{given}") == RunConfig(
        "out", prune=PruneConfig(ratio=0.25)
    )
