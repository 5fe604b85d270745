"""The tour of a user, by the commands of the pages, with another model and folder (tests/run_heavy.sh)."""

import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from pydoc_data.topics import topics

from tests.integration.heavy.results import TAKES_MINUTES, ask, python_of
from tests.support.launching import ROOT, Ended, read_json, run_to_end

pytestmark = TAKES_MINUTES
FIRST, CONFIGS, EXPORT = (
    ROOT / name / "README.md" for name in ("", "launch/configs", "loraprune_ds/export")
)
STEPS, TARGET = 4, 105  # of 134.5 million parameters


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def documented(page: Path, words: str) -> list[str]:
    """Returns the one command of a page that has these words, without its remark."""
    (line,) = {
        line for block in blocks(page, "bash") for line in block.splitlines() if words in line
    }
    return shlex.split(line, comments=True)


def snippet(page: Path, words: str) -> str:
    """Returns the one piece of Python of a page that has these words."""
    (found,) = [code for code in blocks(page, "python") if words in code]
    return found


def write_chats(path: Path) -> None:
    """Writes conversations about Python, from Python's own help."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {topic}?"},
                {"role": "assistant", "content": text[:900]},
            ]
        }
        for topic, text in sorted(topics.items())
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def test_the_tour(tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    for name in ("launch", "ds_configs", "loraprune_ds"):
        (tmp_path / name).symlink_to(ROOT / name)
    path, python_path = (
        f"{Path(sys.executable).parent}:{os.defpath}",
        f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    )
    environment = {
        "PATH": path,
        "PYTHONPATH": python_path,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }

    def start(command: list[str], others: Mapping[str, str] = {}) -> Ended:
        words = [others.get(word, word) for word in command]
        return run_to_end(words, cwd=tmp_path, environment=environment, timeout=1500).check()

    # Chats, as launch/configs/README.md has it, with the quickstart's config and a run of a minute.
    command = documented(CONFIGS, "data.format=chat")
    assert command[0] == "deepspeed"
    command[1:1] = ["--quiet", "--num_accelerators", "2"]
    small = [
        f"train.steps={STEPS}",
        "train.micro_batch_size=2",
        "prune.prune_every=2",
        "evaluate.max_windows=8",
        "evaluate.after=[]",
    ]
    small += [
        "output_dir=runs/mine",
        "data.window=256",
        "evaluate.every=2",
        "prune.channel_multiple=64",
    ]
    small += ["prune.ratio=null", f"prune.target={TARGET}M"]
    small += ["logging.report_to=[wandb]"]  # tests/run_heavy.sh installs it
    command += [word for setting in small for word in ("--set", setting)]
    start(command, {"launch/configs/qwen3-8b.yaml": "launch/configs/quickstart.yaml"})

    run = tmp_path / "runs/mine"
    report = read_json(run / "report.json")
    assert report["config"]["data"]["format"] == "chat"
    # One step of `uniform` is 64 channels of 26 layers, in three linears of hidden size 576.
    assert TARGET * 1e6 >= report["target"]["reached"] > TARGET * 1e6 - 26 * 64 * 3 * 576
    assert (run / "training.png").is_file()
    assert (run / "kept_groups.png").is_file()
    (written,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert b"cut/reached" in written.read_bytes()

    compared = start(
        documented(FIRST, "launch/compare.py"), {"runs/a": "runs/mine", "runs/b": "runs/mine"}
    )
    assert "mine" in compared.out
    assert (tmp_path / "compare.png").is_file()

    # From README.md to the page about servers, and to an answer.
    assert f"({EXPORT.relative_to(ROOT)})" in FIRST.read_text()
    start(documented(FIRST, "--format gguf-q8_0"))
    python = python_of("LLAMA_CPP_PYTHON")
    assert len(ask(python, "-c", snippet(EXPORT, "llama_cpp"), cwd=tmp_path).stdout.split()) > 3

    command = [
        *documented(EXPORT, "--server llama.cpp"),
        "--prompt",
        "64",
        "--generated",
        "8",
        "--rounds",
        "1",
    ]
    timed = start(command, {"path/to/venv/bin/python": python})
    assert "decode_tokens_per_second" in timed.out
