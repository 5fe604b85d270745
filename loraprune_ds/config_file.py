"""Reads YAML and `--set` overrides into the frozen dataclasses of `config.py`."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import TypeAdapter, ValidationError

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError, one_line, require

SHIPPED = Path(__file__).parent / "shipped"  # has launch/configs/ and ds_configs/, in a checkout and in a wheel
SEE = "(tests/benchmarks/README.md)"
REMOVED = {  # keys and values of earlier versions, and why
    "prune.joint_budget": f"it measured no better than separate budgets {SEE}",
    "prune.channel_share": f"channels of all experts cost more perplexity than as many whole ones {SEE}",
    "prune.compensate=bias": f"prune.compensate: least_squares measured better on every text {SEE}",
    "prune.criterion=reap": f"prune.criterion: lora measured better with the same steps {SEE}",
    "prune.gradient_every": "its name is prune.score_every",
    "prune.min_heads": "prune.max_layer_ratio is the limit of what a layer may lose",
    "prune.min_channels": "prune.max_layer_ratio is the limit of what a layer may lose",
    "prune.compensate_ridge": f"0.05 was right wherever it was measured {SEE}",
    "prune.target_batch": "prune.target_context counts the tokens of all sequences",
    "prune.target_embedding_bits": "embedding, head, norms and biases count 16 bits",
    "prune.target_kv_bits": "a value in the KV cache counts 16 bits",
    "train.recovery_learning_rate": "the recovery starts at train.learning_rate",
    "train.weight_decay": "LoRA trains without weight decay",
    "train.adam_beta1": "it is 0.9",
    "train.adam_beta2": "it is 0.999",
    "train.loss_chunk_tokens": "256 MiB of logits are held at once",
    "checkpoint.copy_source": "loraprune-ds export makes a folder that needs no other",
    "logging.progress": "a terminal gets a live line, a file plain lines",
    "logging.tensorboard": "logging.report_to names all that get the records; [] is none",
    "logging.verbose": "DeepSpeed and transformers tell errors only",
}
# The values that removed settings had where nobody set them. A run with these is the same run without.
DEFAULTS_OF_REMOVED: dict[str, Any] = {
    "prune.min_heads": 1,
    "prune.min_channels": 1,
    "prune.compensate_ridge": 0.05,
    "prune.target_batch": 1,
    "prune.target_embedding_bits": 16.0,
    "prune.target_kv_bits": 16.0,
    "train.recovery_learning_rate": None,
    "train.weight_decay": 0.0,
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.loss_chunk_tokens": None,
    "checkpoint.copy_source": False,
    "logging.progress": True,
    "logging.verbose": False,
}
# Whatever a recorded run had for these, its result is the same without.
NO_EFFECT_ON_RESULT = ("train.loss_chunk_tokens", "checkpoint.copy_source", "logging.progress", "logging.verbose")
TYPES = {"int_type": "int", "float_type": "float", "bool_type": "bool", "string_type": "str"}  # by pydantic's names


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key given twice. A section pasted in would silently replace the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run from YAML. `overrides` are `key=value` or `section.key=value`, values in YAML.

    Raises:
        UserError: no such file, not a mapping, a wrong type or a value out of range. Or an unknown key: the message
            lists the known ones. Or one of `REMOVED`: the message says why.
    """
    return config_from_dict(read_config(path, overrides))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads only the keys that the YAML and the overrides give.

    Raises:
        UserError: no such file, not YAML or not a mapping, or an override has another form.
    """
    path = find_shipped(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise UserError(f"config file {path} {what}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise UserError(f"config file {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a mapping of keys to values")
    for override in overrides:
        apply_override(raw, override)
    return raw


def find_shipped(path: str | Path) -> Path:
    """Finds a file as given, or else among those that come with the package. So these serve from any directory."""
    given = Path(path).expanduser()
    shipped = SHIPPED / given
    return shipped if shipped.is_file() and not given.exists() else given


def config_value(config: RunConfig, dotted: str) -> Any:
    """Returns the value of `key` or `section.key`.

    Raises:
        UserError: no such key, or a section.
    """
    value: Any = config.to_dict()
    for key in dotted.split("."):
        value = value.get(key, {}) if isinstance(value, dict) else {}
    require(not isinstance(value, dict), f"the config has no value {dotted}")
    return value


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """Checks a nested dictionary, such as `RunConfig.to_dict` gives and a checkpoint keeps.

    Raises:
        UserError: as `load_config`.
    """
    return _build(RunConfig, _without(raw, _is_old_default))


def forget_removed(saved: dict[str, Any]) -> dict[str, Any]:
    """Returns a recorded config without the settings that are gone, where the run is the same without them.

    Raises:
        UserError: one of them had a value that would make it another run.
    """
    kept = _without(saved, lambda name, value: name in NO_EFFECT_ON_RESULT or _is_old_default(name, value))
    for name in DEFAULTS_OF_REMOVED:
        section, key = name.split(".")
        if key in (values := kept.get(section) or {}):
            raise UserError(f"this run has {name} {values[key]!r}, which is gone: {REMOVED[name]}")
    return kept


def _is_old_default(name: str, value: Any) -> bool:
    return name in DEFAULTS_OF_REMOVED and value == DEFAULTS_OF_REMOVED[name]


def _without(raw: dict[str, Any], is_dropped: Callable[[str, Any], bool]) -> dict[str, Any]:
    """Returns a copy of a config without the values of `section.key` for which `is_dropped`."""
    return {
        section: {key: value for key, value in values.items() if not is_dropped(f"{section}.{key}", value)}
        if isinstance(values, dict)
        else values
        for section, values in raw.items()
    }


def merge(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns `saved` with the values of `given` in place of its own, key by key in all sections."""
    merged = dict(saved)
    for key, value in given.items():
        section = saved.get(key)
        merged[key] = merge(section, value or {}) if isinstance(section, dict) and _is_section(value) else value
    return merged


def _is_section(value: Any) -> bool:
    return value is None or isinstance(value, dict)  # a section without any keys is None in YAML


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Puts a `section.key=value` into the nested dictionary of a run.

    Raises:
        UserError: the override has another form.
    """
    dotted, separator, value = override.partition("=")
    require(bool(separator and dotted), f"--set takes key=value, got {override!r}")
    *sections, key = dotted.strip().split(".")
    target = raw
    for section in sections:
        if target.get(section) is None:  # absent, or a section without any keys
            target[section] = {}
        target = target[section]
        require(isinstance(target, dict), f"--set {dotted}: {section} is not a section")
    try:
        target[key] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {dotted}: {value!r} is not a YAML value") from None


def _build(cls: type, raw: Any, prefix: str = "") -> Any:
    """Makes a section, or the whole run, of a dictionary. An empty section has its defaults."""
    require(isinstance(raw, dict), f"{prefix.rstrip('.')} must be a section of keys, got {raw!r}")
    values = {str(key): value for key, value in raw.items()}
    for f in dataclasses.fields(cls):
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type) and f.name in values:
            value = values[f.name]
            values[f.name] = _build(f.type, {} if value is None else value, f"{prefix}{f.name}.")
        elif (item := _entry_class(f.type)) and isinstance(values.get(f.name), list):
            values[f.name] = [_build(item, v, f"{prefix}{f.name}[{i}].") for i, v in enumerate(values[f.name])]
    try:
        return cls(**values)
    except ValidationError as error:
        raise UserError(_describe(error, cls, prefix)) from None


def _entry_class(kind: Any) -> type | None:
    """Returns the dataclass whose list a key may hold, if there is one."""
    items = [item for choice in get_args(kind) if get_origin(choice) is list for item in get_args(choice)]
    return next(filter(dataclasses.is_dataclass, items), None)


def _describe(error: ValidationError, cls: type, prefix: str) -> str:
    """Tells the first problem in one line. A key that is gone goes first, then an unknown one: it may be mistyped."""
    problems = error.errors()
    named = {f"{prefix}{p['loc'][0]}{value}" for p in problems for value in ("", f"={p['input']}")}
    if gone := next((name for name in REMOVED if name in named), None):
        return f"{gone} is gone: {REMOVED[gone]}"
    first = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), problems[0])
    key = str(first["loc"][0])
    match first["type"]:
        case "unexpected_keyword_argument":
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            return f"unknown key {prefix}{key}; known keys there: {known}"
        case "missing":
            return f"the key {prefix}{key} is missing"
        case "value_error":  # float() of a string
            wanted = "a number"
        case "finite_number":
            wanted = "finite"
        case kind:
            wanted = f"of type {TYPES[kind]}" if kind in TYPES else _allowed(cls, key)
    return f"{prefix}{key} must be {wanted}; got {first['input']!r}"


def _allowed(cls: type, key: str) -> str:
    """Says in words what the JSON schema of `cls` allows for the value of `key`."""
    schema = TypeAdapter(cls).json_schema()["properties"][key]
    match schema.get("anyOf", [schema])[0]:  # the second one is null
        case {"enum": choices}:
            return f"one of {', '.join(choices)}"
        case {"items": {"enum": choices}}:
            return f"a list of {', '.join(choices)}"
        case {"minimum": low, "maximum": high}:
            return f"in [{low}, {high}]"
        case {"minimum": low, "exclusiveMaximum": high}:
            return f"in [{low}, {high})"
        case {"exclusiveMinimum": low, "maximum": high}:
            return f"in ({low}, {high}]"
        case {"exclusiveMinimum": low, "exclusiveMaximum": high}:
            return f"in ({low}, {high})"
        case {"minimum": low}:
            return f"at least {low}"
    return "positive"
