"""YAML and `--set` overrides -> the frozen dataclasses of `config.py`."""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from loraprune_ds.config import RunConfig
from loraprune_ds.config_checks import require
from loraprune_ds.errors import UserError, one_line

CHECKOUT = Path(__file__).resolve().parents[1]


class _UniqueKeys(yaml.SafeLoader):
    """YAML of which no mapping gives a key twice: a section that was pasted in would silently replace the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run from YAML; `overrides` are `key=value` or `section.key=value`, values in YAML.

    Raises:
        UserError: no such file, not a mapping, an unknown key (the message lists the known ones), a wrong type,
            or a value out of range.
    """
    path = Path(path)
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
    return _build(RunConfig, raw, "")


def config_value(config: RunConfig, dotted: str) -> Any:
    """The value of `key` or `section.key`.

    Raises:
        UserError: no such key, or a section.
    """
    value: Any = config.to_dict()
    for key in dotted.split("."):
        value = value.get(key, {}) if isinstance(value, dict) else {}
    require(not isinstance(value, dict), f"the config has no value {dotted}")
    return value


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """A resolved config, as `RunConfig.to_dict` gives it and a checkpoint keeps it.

    Raises:
        UserError: as `load_config`.
    """
    return _build(RunConfig, raw, "")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Puts a `section.key=value` into the nested dictionary of a run.

    Raises:
        UserError: no such form.
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


def _build(cls: type, raw: Any, prefix: str) -> Any:
    require(isinstance(raw, dict), f"{prefix.rstrip('.')} must be a section of keys, got {raw!r}")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        require(key in known, f"unknown key {prefix}{key}; known keys there: {', '.join(known)}")
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        require(not required or f.name in raw, f"the key {prefix}{f.name} is missing")
    return cls(**{key: _convert(hints[key], value, f"{prefix}{key}") for key, value in raw.items()})


def _convert(hint: Any, value: Any, key: str) -> Any:
    """YAML value -> field type. YAML reads `1e-4` as a string and `16` as an int, both fine for a float."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), {} if value is None else value, f"{key}.")
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kind = next(a for a in allowed if a is not type(None))
    if kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{key} must be a number; got {value!r}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    require(type(value) is kind, f"{key} must be of type {kind.__name__}; got {value!r}")
    require(kind is not float or math.isfinite(typing.cast(float, value)), f"{key} must be finite; got {value!r}")
    return value
