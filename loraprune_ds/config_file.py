"""Reads YAML and `--set` overrides into the frozen dataclasses of `config.py`."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from loraprune_ds.config import RunConfig
from loraprune_ds.errors import UserError, one_line, require

SHIPPED = Path(__file__).parent / "shipped"  # has launch/configs/ and ds_configs/, in a checkout and in a wheel


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
        UserError: the file cannot be read, or a key or value in it is wrong. The line names the key.
    """
    return config_from_dict(read_config(path, overrides))


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads only the keys that the YAML and the overrides give. Raises UserError like `load_config`."""
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
    require(isinstance(raw, dict), f"{path} must be a mapping of keys to values")
    for override in overrides:
        apply_override(raw, override)
    return raw


def find_shipped(path: str | Path) -> Path:
    """Finds a file as given, or else among those that come with the package."""
    given = Path(path).expanduser()
    shipped = SHIPPED / given
    return shipped if shipped.is_file() and not given.exists() else given


def config_value(config: RunConfig, dotted: str) -> Any:
    """Returns the value of `key` or `section.key`. Raises UserError if there is none."""
    values = dict(dotted_values(config.to_dict()))
    require(dotted in values, f"the config has no value {dotted}")
    return values[dotted]


def config_from_dict(raw: dict[str, Any]) -> RunConfig:
    """Checks a nested dictionary, such as `RunConfig.to_dict` gives. Raises UserError like `load_config`."""
    return _build(RunConfig, raw)


def differences(old: RunConfig, new: RunConfig, ignored: Sequence[str]) -> list[str]:
    """Finds the dotted keys whose values differ. Sections and keys in `ignored` do not count."""
    before = dict(dotted_values(old.to_dict()))
    keys = [key for key, value in dotted_values(new.to_dict()) if value != before[key]]
    return [key for key in keys if key not in ignored and key.partition(".")[0] not in ignored]


def dotted_values(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of all sections under dotted keys."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from dotted_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns `saved` with the values of `given` in it, key by key in all sections."""
    merged = dict(saved)
    for key, value in given.items():
        section = saved.get(key)
        if isinstance(section, dict) and isinstance(value, dict | None):  # an empty section is None in YAML
            value = merge(section, value or {})
        merged[key] = value
    return merged


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Puts a `section.key=value` into the nested dictionary of a run."""
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
    """Makes a section or the whole run from a dictionary. An empty section gets its defaults."""
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
    """Returns the dataclass of a key that may hold a list of them."""
    items = [item for choice in get_args(kind) if get_origin(choice) is list for item in get_args(choice)]
    return next(filter(dataclasses.is_dataclass, items), None)


def _describe(error: ValidationError, cls: type, prefix: str) -> str:
    """Describes the most likely cause in one line: an unknown key, then a wrong value."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "unexpected_keyword_argument"), problems[0])
    key = f"{prefix}{first['loc'][0]}"
    match first["type"]:
        case "unexpected_keyword_argument":
            return f"unknown key {key}; known keys there: {', '.join(f.name for f in dataclasses.fields(cls))}"
        case "missing":
            return f"the key {key} is missing"
    return f"{key} {first['msg'].replace('Input should', 'must')}; got {first['input']!r}"
