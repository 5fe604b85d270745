"""Reads YAML and `--set` overrides into the frozen dataclasses of `config.py`."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from loraprune_ds.config import MixtureEntry, RunConfig, SourceKeys
from loraprune_ds.config_types import LIST, ONE
from loraprune_ds.errors import UserError, one_line, require
from loraprune_ds.files import JsonObject, read_text
from loraprune_ds.removed import KEYS

# has launch/configs/ and ds_configs/, in a checkout and in a wheel
SHIPPED = Path(__file__).parent / "shipped"
RUN = TypeAdapter(RunConfig)
SECTIONS: dict[Any, Any] = {
    f.name: f.type for f in dataclasses.fields(RunConfig) if dataclasses.is_dataclass(f.type)
}
# of `data` and a mixture's entries
SHARED_KEYS = [f.name for f in dataclasses.fields(SourceKeys) if f.name != "path"]
# None leaves these to a rule (pruning/target.py), which has decided them for a saved run
BY_RULE = ("ranking", "compensate")


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys. A section pasted twice would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> JsonObject:
    """Reads only the given keys, from the YAML and the overrides: `key=value` or `section.key=value`, values in YAML.

    Raises:
        UserError: the file or an override cannot be read. The line names it.
    """
    path = find_shipped(path)
    text = read_text(path, "config file")
    try:
        raw = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number too long
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    require(isinstance(raw, dict), f"{path} must be a mapping of keys to values")
    for override in overrides:
        apply_override(raw, override)
    return raw


def find_shipped(path: str | Path) -> Path:
    """Finds a file at its path, or else among the shipped files of the package."""
    path = Path(path).expanduser()
    shipped = SHIPPED / path
    return shipped if shipped.is_file() and not path.exists() else path


def config_value(config: RunConfig, dotted: str) -> Any:
    """Returns the value of `key` or `section.key`. Raises UserError if there is none."""
    values = dict(dotted_values(config.to_dict()))
    require(dotted in values, f"the config has no value {dotted}")
    return values[dotted]


def config_from_dict(raw: JsonObject) -> RunConfig:
    """Checks a nested dictionary, such as from `read_config`. Raises UserError, which names the wrong key."""
    given = {key: value for key, value in raw.items() if value is not None or key not in SECTIONS}
    data = given.get("data")
    if isinstance(data, dict) and isinstance(data.get("path"), list):
        entries = [_complete(entry, data) for entry in data["path"]]
        given["data"] = data | {"path": entries}
    try:
        # strict Python values would not be sections
        return RUN.validate_json(json.dumps(given, default=str))
    except ValidationError as error:
        raise UserError(_describe(error)) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"the config may hold only keys, lists and plain values: {error}") from None


def differences(old: RunConfig, new: RunConfig, ignored: Sequence[str]) -> list[str]:
    """Finds the dotted keys whose values differ. Sections and keys in `ignored` do not count."""
    before = dict(dotted_values(old.to_dict()))
    return [
        key
        for key, value in dotted_values(new.to_dict())
        if value != before[key] and {key, key.partition(".")[0]}.isdisjoint(ignored)
    ]


def dotted_values(section: JsonObject, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of all sections under dotted keys."""
    for key, value in section.items():
        if isinstance(value, dict):
            yield from dotted_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def merge(saved: JsonObject, given: JsonObject) -> JsonObject:
    """Returns `saved` with the values of `given`, key by key in all sections."""
    merged = dict(saved)
    for key, value in given.items():
        if value is None and key in BY_RULE:
            continue
        section = saved.get(key)
        # an empty section is None in YAML
        if isinstance(section, dict) and isinstance(value, dict | None):
            value = merge(section, value or {})
        merged[key] = value
    return merged


def apply_override(raw: JsonObject, override: str) -> None:
    """Sets a `section.key=value` in the nested dictionary of a run."""
    dotted, separator, value = override.partition("=")
    require(separator and dotted, f"--set takes key=value, got {override!r}")
    *sections, key = dotted.strip().split(".")
    target = raw
    for section in sections:
        if target.get(section) is None:  # absent, or a section without any keys
            target[section] = {}
        target = target[section]
        require(isinstance(target, dict), f"--set {dotted}: {section} is not a section")
    try:
        target[key] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--set {dotted}: {value!r} is not a YAML value") from None


def _complete(entry: Any, data: JsonObject) -> Any:
    """Fills the missing or empty keys of a mixture's entry from `data`."""
    if entry and isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict):
        return entry
    shared = {key: data[key] for key in SHARED_KEYS if key in data}
    values = {key: value for key, value in entry.items() if value is not None}
    return shared | values


def _describe(error: ValidationError) -> str:
    """Describes the most likely cause in one line: an unknown key, then a wrong value, in outer sections first."""
    errors = error.errors()
    unknown = [x for x in errors if x["type"] == "unexpected_keyword_argument"]
    problem = min(unknown or errors, key=lambda problem: len(problem["loc"]))
    path = [part for part in problem["loc"] if part not in (ONE, LIST)]
    key = ""  # such as data.path[1].weight
    for part in path:
        key += f"[{part}]" if isinstance(part, int) else f".{part}"
    key = key.removeprefix(".")
    if unknown:
        return f"unknown key {key}; {_advice(key, path)}"
    match problem["type"]:
        case "missing":
            return f"the key {key} is missing"
        case "dataclass_type":
            return f"{key} must be a section of keys, got {problem['input']!r}"
        case "json_invalid":
            return f"a value is not Unicode text: {problem['msg']}"
    message = problem["msg"].replace("Input should", "must").replace("array", "list")
    return f"{key} {message}; got {problem['input']!r}"


def _advice(key: str, path: list[str | int]) -> str:
    """Says what to do in place of a removed key, or which keys exist there."""
    if key in KEYS:
        return KEYS[key]
    section = RunConfig
    if len(path) == 2:
        section = SECTIONS[path[0]]
    elif len(path) > 2:
        section = MixtureEntry
    names = [field.name for field in dataclasses.fields(section)]
    return f"known keys there: {', '.join(names)}"
