"""A run config is accepted, or refused in one line that names the key."""

import dataclasses
import errno
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from loraprune_ds.config import PruneConfig, RunConfig, TrainConfig
from loraprune_ds.config_file import REMOVED, config_from_dict, config_value, load_config
from loraprune_ds.errors import UserError
from tests.unit.shapes_and_scores import repository

SHIPPED = sorted((repository() / "launch" / "configs").glob("*.yaml"))


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, overrides)


def refused(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert (repository() / config.deepspeed).is_file()
    assert config.prune.ratio is not None
    assert 0 < config.prune.ratio < 1
    assert config.output_dir == f"runs/{path.stem}"


def test_the_papers_sizes_ship() -> None:
    assert {path.stem for path in SHIPPED} >= {"quickstart", "llama-7b", "llama-13b", "llama-30b", "llama-65b"}
    for name in ("llama-7b", "llama-65b"):
        config = load_config(repository() / "launch" / "configs" / f"{name}.yaml")
        assert (config.lora.r, config.lora.lora_alpha, config.lora.lora_dropout) == (8, 16, 0.05)
        assert (config.train.global_batch_size, config.train.learning_rate, config.train.epochs) == (128, 1e-4, 2)
        assert (config.data.window, config.prune.prune_every, config.prune.moving_average) == (512, 10, 0.9)


def test_large_models_compute_activations_twice_rather_than_keep_them() -> None:
    """Another test shows that it changes no score: tests/numerics/test_sharded_equals_dense.py."""
    large = [load_config(path) for path in SHIPPED if not path.stem.startswith(("quickstart", "recipe"))]
    assert len(large) >= 9
    assert all(config.train.gradient_checkpointing for config in large)


def test_defaults_and_sections(tmp_path: Path) -> None:
    config = load(tmp_path, "output_dir: out\nprune:\n  ratio: 0.25\nlora:\n")
    assert config == RunConfig("out", prune=PruneConfig(ratio=0.25))


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    for path in SHIPPED:
        config = load_config(path, ["train.adam_epsilon=1e-9", "prune.normalize=none", "model.revision='1'"])
        assert load(tmp_path, yaml.safe_dump(config.to_dict())) == config


# Types


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 1e-4", 1e-4),  # YAML 1.1 reads this as a string
        ("learning_rate: 1.0e-4", 1e-4),
        ("learning_rate: 1", 1.0),
        ("learning_rate: '0.5'", 0.5),
        ("max_grad_norm: 0", 0.0),
    ],
)
def test_numbers_as_people_write_them(tmp_path: Path, line: str, value: float) -> None:
    train = load(tmp_path, f"output_dir: out\ntrain:\n  steps: 3\n  {line}\n").train
    found = getattr(train, line.split(":")[0])
    assert found == value
    assert type(found) is float


def test_every_number_may_be_a_string(tmp_path: Path) -> None:
    config = load(tmp_path, "output_dir: out\n", "train.epochs=0.5", "train.steps=null", "prune.head_ratio=0.5")
    raw = config.to_dict()
    for section in (section for section in raw.values() if isinstance(section, dict)):
        section |= {key: str(value) for key, value in section.items() if isinstance(value, float)}
    assert load(tmp_path, yaml.safe_dump(raw)) == config


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("train: {steps: ten}", "train.steps must be of type int; got 'ten'"),
        ("train: {steps: 10.0}", "train.steps must be of type int; got 10.0"),
        ("train: {steps: true}", "train.steps must be of type int; got True"),
        ("train: {steps: 3, learning_rate: fast}", "train.learning_rate must be a number; got 'fast'"),
        ("train: {steps: 3, learning_rate: true}", "train.learning_rate must be of type float; got True"),
        ("train: {steps: 3, learning_rate: null}", "train.learning_rate must be of type float; got None"),
        ("train: {steps: 3, learning_rate: [1]}", "train.learning_rate must be of type float; got [1]"),
        ("train: {steps: 3, learning_rate: .inf}", "train.learning_rate must be finite; got inf"),
        ("prune: {ratio: .nan}", "prune.ratio must be finite; got nan"),
        ("data: {packing: 1}", "data.packing must be of type bool; got 1"),
        ("model: {path: 7}", "model.path must be of type str; got 7"),
        ("model: embedded", "model must be a section of keys, got 'embedded'"),
        ("seed: 1.5", "seed must be of type int; got 1.5"),
    ],
)
def test_a_wrong_type_names_the_key(tmp_path: Path, yaml_text: str, message: str) -> None:
    assert refused(tmp_path, f"output_dir: out\n{yaml_text}\n") == message


@pytest.mark.parametrize(
    ("yaml_text", "key"),
    [
        ("seed: -1", "seed"),
        ("lora: {r: 0}", "lora.r"),
        ("lora: {lora_dropout: 1}", "lora.lora_dropout"),
        ("data: {window: 1}", "data.window"),
        ("data: {format: csv}", "data.format"),
        ("data: {held_out_fraction: 1}", "data.held_out_fraction"),
        ("data: {max_samples: 0}", "data.max_samples"),
        ("prune: {ratio: 0}", "prune.ratio"),
        ("prune: {ratio: 1}", "prune.ratio"),
        ("prune: {criterion: taylor}", "prune.criterion"),
        ("prune: {ranking: local}", "prune.ranking"),
        ("prune: {moving_average: 1}", "prune.moving_average"),
        ("prune: {prune_every: 0}", "prune.prune_every"),
        ("prune: {channel_multiple: 0}", "prune.channel_multiple"),
        ("prune: {max_layer_ratio: 0}", "prune.max_layer_ratio"),
        ("prune: {protected_first: -1}", "prune.protected_first"),
        ("prune: {warmup_fraction: 1}", "prune.warmup_fraction"),
        ("prune: {warmup_fraction: 0.5, cooldown_fraction: 0.5}", "prune.warmup_fraction + prune.cooldown_fraction"),
        ("prune: {score_every: 0}", "prune.score_every"),
        ("prune: {compensate: mean}", "prune.compensate"),
        ("prune: {compensate_steps: 0}", "prune.compensate_steps"),
        ("prune: {compensate_decay: 1}", "prune.compensate_decay"),
        ("train: {steps: 0}", "train.steps"),
        ("train: {steps: 1, recovery_steps: -1}", "train.recovery_steps"),
        ("train: {steps: 1, distill_weight: 1.5}", "train.distill_weight"),
        ("train: {steps: 1, distill_top_k: 0}", "train.distill_top_k"),
        ("train: {epochs: 0}", "train.epochs"),
        ("train: {steps: 1, learning_rate: 0}", "train.learning_rate"),
        ("train: {steps: 1, lr_scheduler: step}", "train.lr_scheduler"),
        ("train: {steps: 1, warmup_steps: -1}", "train.warmup_steps"),
        ("train: {steps: 10, warmup_steps: 10}", "train.warmup_steps"),
        ("train: {steps: 1, max_grad_norm: -1}", "train.max_grad_norm"),
        ("train: {steps: 1, adam_epsilon: 0}", "train.adam_epsilon"),
        ("train: {steps: 1, micro_batch_size: 0}", "train.micro_batch_size"),
        ("train: {steps: 1, global_batch_size: 10, micro_batch_size: 4}", "train.global_batch_size"),
        ("evaluate: {window: 1}", "evaluate.window"),
        ("train: {steps: 1, global_batch_size: 0}", "train.global_batch_size"),
        ("evaluate: {max_windows: 0}", "evaluate.max_windows"),
        ("evaluate: {batch_size: 0}", "evaluate.batch_size"),
        ("evaluate: {every: 0}", "evaluate.every"),
        ("checkpoint: {every: 0}", "checkpoint.every"),
        ("checkpoint: {keep_last: 0}", "checkpoint.keep_last"),
    ],
)
def test_a_value_out_of_range_names_the_key(tmp_path: Path, yaml_text: str, key: str) -> None:
    assert refused(tmp_path, f"output_dir: out\n{yaml_text}\n").startswith(f"{key} ")


@pytest.mark.parametrize(
    ("yaml_text", "message"),
    [
        ("seed: 4294967296", "seed must be in [0, 4294967296); got 4294967296"),
        ("model: {dtype: x}", "model.dtype must be one of bfloat16, float16, float32; got 'x'"),
        ("prune: {normalize: max}", "prune.normalize must be one of l2, step, none; got 'max'"),
        ("prune: {ratio: 2}", "prune.ratio must be in (0, 1); got 2"),
        ("prune: {head_ratio: 1}", "prune.head_ratio must be in [0, 1); got 1"),
        ("prune: {max_layer_ratio: 1.1}", "prune.max_layer_ratio must be in (0, 1]; got 1.1"),
        ("train: {steps: 1, learning_rate: 101}", "train.learning_rate must be in (0, 100]; got 101"),
        ("train: {steps: 1, distill_weight: -1}", "train.distill_weight must be in [0, 1]; got -1"),
        ("prune: {protected_last: -1}", "prune.protected_last must be at least 0; got -1"),
        ("lora: {lora_alpha: 0}", "lora.lora_alpha must be positive; got 0"),
    ],
)
def test_a_value_out_of_range_is_told_the_range(tmp_path: Path, yaml_text: str, message: str) -> None:
    assert refused(tmp_path, f"output_dir: out\n{yaml_text}\n") == message


def test_a_value_at_the_edge_of_its_range(tmp_path: Path) -> None:
    prune = "{head_ratio: 0, moving_average: 0, max_layer_ratio: 1, protected_first: 0, protected_last: 0}"
    train = "{steps: 1, learning_rate: 100, max_grad_norm: 0, distill_weight: 1}"
    data = "{window: 2, max_samples: 1}"
    load(tmp_path, f"output_dir: out\nseed: 4294967295\nprune: {prune}\ntrain: {train}\ndata: {data}\n")


def test_a_copy_with_changes_is_checked() -> None:
    assert dataclasses.replace(PruneConfig(), ratio=0.1) == PruneConfig(ratio=0.1)
    with pytest.raises(ValidationError, match="ratio"):
        dataclasses.replace(PruneConfig(), ratio=1.0)
    with pytest.raises(UserError, match="exactly one of"):
        dataclasses.replace(TrainConfig(steps=1), epochs=1.0)


def test_a_file_and_a_part_of_the_data_are_not_held_out_at_once(tmp_path: Path) -> None:
    message = "give exactly one of data.held_out and data.held_out_fraction; null takes one away"
    alone = load(tmp_path, "output_dir: out\ndata: {held_out: text.txt}\n")
    assert alone.data.held_out_fraction is None
    with pytest.raises(UserError, match=f"^{message}$"):
        config_from_dict({"output_dir": "out", "data": {"held_out": "text.txt", "held_out_fraction": 0.1}})
    assert refused(tmp_path, "output_dir: out\ndata: {held_out_fraction: null}\n") == message
    part = "output_dir: out\ndata: {held_out_fraction: 0.001}\n"
    assert load(tmp_path, part).data.held_out_fraction == 0.001
    assert load(tmp_path, part, "data.held_out=text.txt", "data.held_out_fraction=null") == alone


@pytest.mark.parametrize(
    ("yaml_text", "key", "needed"),
    [
        ("prune: {compensate_steps: 3}", "prune.compensate_steps", "prune.compensate: least_squares"),
        ("prune: {compensate_decay: 0.9}", "prune.compensate_decay", "prune.compensate: least_squares"),
        ("train: {steps: 1, distill_top_k: 8}", "train.distill_top_k", "train.distill_weight"),
    ],
)
def test_a_setting_that_nothing_reads_names_what_is_missing(
    tmp_path: Path, yaml_text: str, key: str, needed: str
) -> None:
    assert refused(tmp_path, f"output_dir: out\n{yaml_text}\n") == f"{key} has no effect without {needed}"


def test_steps_and_epochs_exclude_each_other(tmp_path: Path) -> None:
    for train in ("{steps: 3, epochs: 1}", "{global_batch_size: 4}"):
        assert refused(tmp_path, f"output_dir: out\ntrain: {train}\n") == (
            "give exactly one of train.steps and train.epochs"
        )
    assert load(tmp_path, "output_dir: out\ntrain: {steps: 3}\n", "train.steps=null", "train.epochs=0.5").train.epochs


# Keys and files


def test_an_unknown_key_lists_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "output_dir: out\nprune: {sparsity: 0.5}\n")
    assert message.startswith("unknown key prune.sparsity; known keys there: ratio, target, ")
    known = message.split(": ", 1)[1].split(", ")
    assert known == [f.name for f in dataclasses.fields(PruneConfig)]
    for text in ("output_dir: out\nprunning: {}\n", "prunning:\n"):  # told before the missing output_dir
        assert refused(tmp_path, text).startswith("unknown key prunning; known keys there: output_dir, seed, ")
    assert refused(tmp_path, "output_dir: out\n1: 2\n").startswith("unknown key 1; known keys there: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1", "the key output_dir is missing"),
        ("[1, 2]", "run.yaml must be a mapping of keys to values"),
        ("", "run.yaml must be a mapping of keys to values"),
        ("a: [", "run.yaml is not valid YAML: "),
        ("train: {learning_rate: 1e-3}\ntrain: {steps: 5}", "run.yaml is not valid YAML: train is given twice in"),
        ("a: 1\n b: 2", "run.yaml is not valid YAML: "),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    assert message in refused(tmp_path, text)


def test_a_file_that_is_no_text_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"output_dir: \xff\xfe")
    with pytest.raises(UserError, match=r"run\.yaml is not valid YAML"):
        load_config(tmp_path / "run.yaml")
    with pytest.raises(UserError, match=r"^config file .*nowhere\.yaml does not exist$"):
        load_config(tmp_path / "nowhere.yaml")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises the file system's error by hand, because root may read everything."""

    def refuse(path: Path, **arguments: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "run.yaml").write_text("output_dir: out")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UserError, match=r"config file .*run\.yaml cannot be read: Permission denied"):
        load_config(tmp_path / "run.yaml")


# --set


def test_overrides(tmp_path: Path) -> None:
    text = "output_dir: out\nmodel:\nprune: {ratio: 0.5}\ntrain: {steps: 3}\n"
    config = load(
        tmp_path,
        text,
        "seed=7",
        "prune.ratio=0.2",
        "train.learning_rate=1e-3",
        "data.path=a=b.txt",  # only the first = separates
        "data.input_field=null",
        "model.path=folder",  # a section that the file has left empty
        "output_dir=elsewhere",
        "prune.ratio=0.3",  # the last one counts
    )
    assert (config.seed, config.prune.ratio, config.train.learning_rate) == (7, 0.3, 1e-3)
    assert (config.data.path, config.data.input_field, config.model.path) == ("a=b.txt", None, "folder")
    assert config.output_dir == "elsewhere"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.ratio", "--set takes key=value, got 'prune.ratio'"),
        ("=3", "--set takes key=value, got '=3'"),
        ("prune.ratoi=0.5", "unknown key prune.ratoi; known keys there: ratio"),
        ("seed.x=1", "--set seed.x: seed is not a section"),
        ("prune.ratio.x=1", "--set prune.ratio.x: ratio is not a section"),
        ("prune=0.5", "prune must be a section of keys, got 0.5"),
        ("prune.ratio=[", "--set prune.ratio: '[' is not a YAML value"),
        ("prune.ratio=", "give exactly one of prune.ratio and prune.target; null takes one away"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    assert refused(tmp_path, "output_dir: out\nseed: 1\nprune: {ratio: 0.5}\n", override).startswith(message)


def test_a_value_can_be_asked_for(tmp_path: Path) -> None:
    config = load(tmp_path, "output_dir: runs/mine\nprune: {ratio: 0.4}", "prune.ratio=0.3")
    assert config_value(config, "output_dir") == "runs/mine"
    assert config_value(config, "prune.ratio") == 0.3
    for key in ("prune", "prune.rate", "output_dir.x", "x", ""):
        with pytest.raises(UserError, match=f"the config has no value {key}$"):
            config_value(config, key)


# The global batch is the unit


def test_accumulation_follows_from_the_ranks() -> None:
    train = TrainConfig(steps=1, global_batch_size=24, micro_batch_size=2)
    assert [train.gradient_accumulation_steps(w) for w in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    for world_size in (5, 7, 8, 24):
        with pytest.raises(UserError, match=r"world sizes that fit: 1, 2, 3, 4, 6, 12$") as caught:
            train.gradient_accumulation_steps(world_size)
        assert re.search(rf"24 in micro-batches of 2 cannot be split over {world_size} ranks", str(caught.value))


def test_normalisation_goes_with_the_ranking() -> None:
    settings: list[tuple[dict[str, Any], str]] = [
        ({"ranking": "uniform"}, "l2"),
        ({"ranking": "global"}, "none"),
        ({"ranking": "uniform", "normalize": "none"}, "none"),
        ({"ranking": "global", "normalize": "l2"}, "l2"),
        ({"ranking": "global", "normalize": "step"}, "step"),
    ]
    for prune, expected in settings:
        assert PruneConfig(**prune).normalization == expected


@pytest.mark.parametrize("target", ["4.5B", "4500000000", "4_500_000_000", "4500M"])
def test_a_target_takes_the_place_of_the_ratio(tmp_path: Path, target: str) -> None:
    config = load(tmp_path, f"output_dir: out\nprune: {{target: {target}}}")
    assert config.prune.ratio is None
    assert config.prune.target_amount is not None
    assert config.prune.target_amount.value == 4.5e9
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ("ratio: 0.4, target: 4B", "give exactly one of prune.ratio and prune.target; null takes one away"),
        ("ratio: null", "give exactly one of prune.ratio and prune.target; null takes one away"),
        ("target: much", "prune.target must be parameters, such as 4.5B, or memory, such as 24GiB; got 'much'"),
        ("target: -4B", "prune.target must be parameters, such as 4.5B, or memory, such as 24GiB; got '-4B'"),
        ("target: 4B, target_context: 100", "prune.target_context has no effect without a prune.target in bytes"),
    ],
)
def test_a_wrong_target_is_refused(tmp_path: Path, prune: str, message: str) -> None:
    assert refused(tmp_path, f"output_dir: out\nprune: {{{prune}}}\n").startswith(message)


@pytest.mark.parametrize("gone", REMOVED)
def test_what_is_gone_is_refused_with_the_reason(tmp_path: Path, gone: str) -> None:
    """Whatever else is wrong beside it."""
    dotted, _, value = gone.partition("=")
    section, key = dotted.split(".")
    message = refused(tmp_path, f"output_dir: out\n{section}: {{another: 7, {key}: {value or 7}}}\n")
    assert message == f"{gone} is gone: {REMOVED[gone]}"
