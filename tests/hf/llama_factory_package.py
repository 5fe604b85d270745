"""LLaMA-Factory prunes by a block in its YAML, and its next commands work. By hand: tests/llama_factory.sh"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json
from tests.oracle.models import make_tiny_llama
from tests.support.callback_results import load
from tests.support.examples import write_rows
from tests.support.launching import ROOT
from tests.support.resuming import read_tensors

OURS = "loraprune_ds.hf.llama_factory"
BIN = Path(sys.executable).parent
ALONE = (sys.executable, "-m", OURS)
TWO_RANKS = (str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", "0", "-m", OURS)
OFFLINE = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
# What LLaMA-Factory's examples/train_lora/qwen3_lora_sft.yaml has, apart from its sizes, and bf16, which CPUs lack
EXAMPLE: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "template": "alpaca",
    "cutoff_len": 64,
    "overwrite_cache": True,
    "output_dir": "out",
    "logging_steps": 1,
    "save_steps": 4,
    "plot_loss": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1.0e-3,
    "max_steps": 8,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "report_to": "none",
    "use_cpu": True,
    "loraprune": {"ratio": 0.3, "prune_every": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(
        tmp_path_factory.mktemp("model"), heads=8, kv_heads=4, hidden=64, ffn=640, layers=4
    )


def write_yaml(folder: Path, model: Path, **more: Any) -> Path:
    write_rows(folder / "rows.jsonl", ("instruction", "input", "output"))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl"}}))
    where = {"model_name_or_path": str(model), "dataset_dir": str(folder), "dataset": "rows"}
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(EXAMPLE | where | more))
    return path


def command(folder: Path, *arguments: Any, text: str = "", code: int = 0) -> str:
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=folder,
        env=os.environ | OFFLINE,
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == bool(code), done.stdout[-4000:]
    return done.stdout


def export_and_compare(folder: Path) -> None:
    """Merges by its own command. Each weight equals our export of the same step."""
    theirs, ours = folder / "theirs", folder / "ours"
    path = folder / "out/next.yaml"
    command(folder, BIN / "llamafactory-cli", "export", path, f"export_dir={theirs}")
    load(theirs)
    export(find_contents(folder / "out/checkpoint-8"), "hf", ours)
    merged, expected = read_tensors(theirs), read_tensors(ours)
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        # one product of LoRA in fp32, which PEFT sums in another order
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("launch", "more"),
    [(ALONE, {}), (TWO_RANKS, {}), (ALONE, {"quantization_bit": 4})],
    ids=["alone", "two_ranks", "qlora"],
)
def test_it_prunes_resumes_exports_and_chats(
    model: Path, tmp_path: Path, launch: tuple[str, ...], more: dict[str, Any]
) -> None:
    path = write_yaml(tmp_path, model, **more)
    told = command(tmp_path, *launch, path)
    assert told.index("30.0 % of the layers' linears") < told.index("'loss'")
    out = tmp_path / "out"
    assert f"llamafactory-cli chat {out / 'next.yaml'}" in told
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    export_and_compare(tmp_path)
    chat = (BIN / "llamafactory-cli", "chat", out / "next.yaml", "max_new_tokens=3")
    assert "Assistant: " in command(tmp_path, *chat, text="the cat sat\nexit\n")
    again = tmp_path / "again"
    shutil.copytree(out / "checkpoint-4", again / "checkpoint-4")
    options = (f"output_dir={again}", f"resume_from_checkpoint={again / 'checkpoint-4'}")
    command(tmp_path, *launch, path, *options)
    for folder in ("", "base"):
        first, second = read_tensors(out / folder), read_tensors(again / folder)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit adamw_torch"),
        ({"finetuning_type": "full"}, "finetuning_type: lora"),
        ({"stage": "kto"}, "stage: sft"),
        ({"use_dora": True}, "use_dora"),
        ({"loraprune": {"ratoi": 0.3}}, "unknown key prune.ratoi"),
        ({"lora_target": "q_proj,v_proj"}, "lora_target lacks down_proj"),
    ],
)
def test_what_cannot_be_pruned_is_the_last_line_before_a_model_is_loaded(
    model: Path, tmp_path: Path, more: dict[str, Any], names: str
) -> None:
    told = command(tmp_path, *ALONE, write_yaml(tmp_path, model, **more), code=1)
    last = told.splitlines()[-1]
    assert last.startswith("error: ")
    assert all(name in last for name in names.split()), told[-2000:]
    assert "all params" not in told
