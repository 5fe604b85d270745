"""Reads states of formats 7 and 8 as if they were of today's. Nothing else knows those formats.

In 7 a run had RunState in step-N/ and ResumeState in its resume/. A callback had one state for both, in one
folder with all tensors. In both the second moments for a refit were kept between cuts. They are not read any more.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraprune_ds.files import STATE_FILE, JsonObject

# fields of a callback's state that a resume alone needs
OF_RESUME = ("updates_since_cut", "moment_tokens")


def is_flat(folder: Path) -> bool:
    """Returns True if a callback has written the folder in format 7, whose tensors have no separate folder."""
    raw: Any = None
    with suppress(OSError, ValueError):
        raw = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    return isinstance(raw, dict) and raw.get("format") == 7 and "prune" in raw


def upgrade_state(raw: JsonObject) -> JsonObject:
    """Returns the fields of `State`. A field that no format has stays, and is refused."""
    fields = dict(raw)
    if raw["format"] == 8:
        return fields
    upgrade = _upgrade_callback if "prune" in raw else _upgrade_run
    return fields | upgrade(fields) | {"scalings": {}, "formats": {}, "trained": []}


def _upgrade_run(fields: JsonObject) -> JsonObject:
    """Takes the fields that have other places now. A run has one scaling, and its settings tell the formats."""
    config = fields.pop("config")
    data = fields.pop("data")
    lora = config["lora"]
    origin = {
        "config": config,
        "steps": data.pop("steps"),
        "seed": config["seed"],
        "query_heads": fields.pop("query_heads", False),
        "folder": fields.pop("source"),
        "digest": data.pop("source"),
        "data": data,
    }
    return {
        "origin": origin,
        "engine": "local" if config["deepspeed"] is None else "zero3",
        "world_size": len(fields["peak_bytes"]),
        "scaling": lora["lora_alpha"] / lora["r"],
    }


def _upgrade_callback(fields: JsonObject) -> JsonObject:
    """Takes the fields that have other places now. The dense model was not recorded, so only a resume is possible."""
    prune = fields.pop("prune")
    for name in (*OF_RESUME, "adam"):
        fields.pop(name, None)
    origin = {
        "config": {"output_dir": "unknown", "prune": prune},
        "steps": fields.pop("steps"),
        "seed": fields.pop("seed"),
        "query_heads": fields.pop("query_heads", False),
        "groups": fields.pop("dense"),
    }
    return {
        "origin": origin,
        "engine": "zero3" if fields.pop("zero", True) else "local",
        "scaling": 1.0,  # nothing reads it
        "asked": prune["ratio"],
        "totals": {},
        "accelerator": "",
        "peak_bytes": [],
    }


def upgrade_resume_state(raw: JsonObject) -> JsonObject:
    """Returns the fields of `ResumeState`."""
    if "prune" not in raw:
        return {name: value for name, value in raw.items() if name != "moment_tokens"}
    adam = raw.get("adam") or {"step": None, "param_groups": []}
    return {
        "updates_since_cut": raw["updates_since_cut"],
        "adam_step": adam["step"],
        "adam_groups": adam["param_groups"],
    }
