"""A mixture of packed conversations and text, with distillation: a run that stops and goes on ends as the other."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.integration.resuming import config_for, contents, losses, run_here, write_run
from tests.ranks import RankPool

STEPS, STOP_AT = 6, 4
TEMPLATE = """{%- for message in messages %}{{- message.role + ': ' + message.content + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"format": "chat", "packing": True, "window": 96},
    "prune": {"prune_every": 2, "criterion": "fisher", "compensate": "least_squares"},
    "train": {"steps": STEPS, "distill_weight": 0.5, "group_by_length": True, "micro_batch_size": 3},
    "checkpoint": {"every": None},
}


def write_chats(path: Path) -> Path:
    words, lines = random.Random(1), []
    for _ in range(120):
        number = words.randrange(100)
        messages = [{"role": "user", "content": f"add {number}"}, {"role": "assistant", "content": str(number + 1)}]
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


def test_a_stopped_run_on_packed_conversations_ends_as_the_run_that_never_stopped(
    ranks: RankPool, tmp_path: Path
) -> None:
    path = write_chat_run(tmp_path)
    straight, stopped = config_for(path, tmp_path / "straight"), config_for(path, tmp_path / "stopped")
    ranks.run(2, run_here, straight)
    ranks.run(2, run_here, stopped, None, STOP_AT)
    ranks.run(2, run_here, stopped, "auto")
    found, expected = (contents(Path(config.output_dir), STEPS) for config in (stopped, straight))
    assert found.kept == expected.kept
    assert found.lora.keys() == expected.lora.keys()
    assert all(torch.equal(found.lora[name], tensor) for name, tensor in expected.lora.items())
    assert losses(tmp_path / "stopped") == losses(tmp_path / "straight")
    one_rank = config_for(path, tmp_path / "one rank")
    ranks.run(1, run_here, one_rank)
    # LoRA's dropout draws by rank, so only the first losses before any update agree, within a dropout of 0.1.
    assert losses(tmp_path / "one rank")[0] == pytest.approx(losses(tmp_path / "straight")[0], rel=0.1)
