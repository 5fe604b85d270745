"""Whole runs on two ranks: conversations with distillation, and a target."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.support.launching import read_json
from tests.support.ranks import RankPool
from tests.support.resuming import assert_same_run, config_for, run_here, write_run

# A mixture of packed conversations and text: a run that stops and goes on ends as the other

STEPS, STOP_AT = 6, 4
TEMPLATE = """{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"format": "chat", "packing": True, "window": 96},
    "prune": {"prune_every": 2, "criterion": "fisher", "compensate": "least_squares"},
    "train": {
        "steps": STEPS,
        "distill_weight": 0.5,
        "group_by_length": True,
        "micro_batch_size": 3,
    },
    "checkpoint": {"every": None},
}


def write_chats(path: Path) -> Path:
    words, lines = random.Random(1), []
    for _ in range(120):
        number = words.randrange(100)
        messages = [
            {"role": "user", "content": f"add {number}"},
            {"role": "assistant", "content": str(number + 1)},
        ]
        lines.append(json.dumps({"messages": messages * words.randint(1, 2)}))
    path.write_text("\n".join(lines))
    return path


def write_chat_run(folder: Path) -> Path:
    path = write_run(folder, **SECTIONS)
    (folder / "source" / "chat_template.jinja").write_text(TEMPLATE)
    chats = {"path": str(write_chats(folder / "chats.jsonl")), "weight": 3}
    text = {"path": str(folder / "text.txt"), "format": "text", "weight": 1}
    config = yaml.safe_load(path.read_text())
    config["data"]["path"] = [chats, text]
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_stopped_run_on_packed_conversations_ends_as_one_that_never_stopped(
    ranks: RankPool, tmp_path: Path
) -> None:
    path = write_chat_run(tmp_path)
    straight, stopped = (
        config_for(path, tmp_path / "straight"),
        config_for(path, tmp_path / "stopped"),
    )
    ranks.run(2, run_here, straight)
    ranks.run(2, run_here, stopped, None, STOP_AT)
    ranks.run(2, run_here, stopped, "auto")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight", STEPS)


def test_a_target_is_reached_on_two_ranks(ranks: RankPool, tmp_path: Path) -> None:
    path = write_run(tmp_path, prune={"ratio": None, "target": "0.08M"})
    ranks.run(
        2, run_here, config_for(path, tmp_path / "out", "train.steps=6", "prune.prune_every=2")
    )
    target = read_json(tmp_path / "out" / "report.json")["target"]
    assert target["dense"] > 80_000 >= target["reached"]
    # One step of `uniform`: a channel of each layer, which is 64 elements in each of three linears.
    assert target["reached"] > 80_000 - 3 * 3 * (64 + 1)
