"""TRL's own scripts prune by a block in their YAML. What they write loads, resumes, and equals our own export."""

import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM

from loraprune_ds.export.contents import find_contents
from loraprune_ds.export.formats import export
from loraprune_ds.files import read_json
from loraprune_ds.hf.trl import main
from tests.oracle.models import make_tiny_llama
from tests.support.callback_results import TOLERANCE, load, logits, relative
from tests.support.examples import DS_CONFIG, write_rows
from tests.support.ranks import RankPool
from tests.support.refusals import must_name
from tests.support.trainers import fresh_accelerate
from tests.support.trl_scripts import refused_script, run_plain, run_script

FIELDS = {"sft": ("text",), "dpo": ("prompt", "chosen", "rejected")}
IDS = torch.arange(3, 35)[None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(
        tmp_path_factory.mktemp("model"), heads=8, kv_heads=4, hidden=64, ffn=640, layers=4
    )


def write_yaml(folder: Path, model: Path, script: str, **more: Any) -> str:
    rows = write_rows(folder / "rows.jsonl", FIELDS[script])
    settings = {
        "model_name_or_path": str(model),
        "dtype": "float32",
        "use_peft": True,
        "lora_dropout": 0.0,
        "datasets": [{"path": "json", "data_files": str(rows), "split": "train"}],
        "output_dir": str(folder / "out"),
        "max_length": 32,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "loraprune": {"ratio": 0.3, "prune_every": 2},
    }
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(settings | more))
    return str(path)


def check_result(out: Path, folder: Path) -> None:
    """Merges by PEFT what the adapter names, and by us the last checkpoint."""
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    base = read_json(out / "adapter_config.json")["base_model_name_or_path"]
    assert base == str(out / "base")
    theirs: Any = AutoPeftModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, trust_remote_code=True
    )
    export(find_contents(out / "checkpoint-6"), "hf", folder)
    ours = load(folder)
    merged = theirs.merge_and_unload().eval()
    assert relative(logits(merged, IDS), logits(ours, IDS)) < TOLERANCE
    assert merged.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]


def check_next(ranks: RankPool, out: Path) -> None:
    """Trains the result on by the config that is written for it, with TRL alone."""
    path = out / "next.yaml"
    assert yaml.safe_load(path.read_text())["logging_steps"] == 2  # a flag of the user
    ranks.run(1, run_plain, ["sft", "--config", str(path)])
    base = read_json(out / "next/adapter_config.json")["base_model_name_or_path"]
    assert base == str(out / "model")
    load(out / "model")


def test_sft_prunes_packs_resumes_by_its_own_setting_and_refuses_the_folder_of_another_run(
    ranks: RankPool, model: Path, tmp_path: Path
) -> None:
    path = write_yaml(tmp_path, model, "sft", packing=True)
    out = tmp_path / "out"
    ranks.run(1, run_script, ["sft", "--config", path, "--logging_steps", "2"])
    check_result(out, tmp_path / "merged")
    check_next(ranks, out)
    (line,) = ranks.run(1, refused_script, ["sft", "--config", path])
    assert "resume_from_checkpoint" in line
    again = tmp_path / "again"
    shutil.copytree(out / "checkpoint-3", again / "checkpoint-3")
    resumed = ["--output_dir", str(again), "--resume_from_checkpoint", str(again / "checkpoint-3")]
    ranks.run(1, run_script, ["sft", "--config", path, *resumed])
    for name in ("adapter_model.safetensors", "base/model-00001-of-00005.safetensors"):
        assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(("script", "deepspeed"), [("dpo", False), ("sft", True)])
def test_two_ranks_prune_on_ddp_and_zero_3(
    ranks: RankPool, model: Path, tmp_path: Path, script: str, deepspeed: bool
) -> None:
    more = {"deepspeed": DS_CONFIG} if deepspeed else {}
    path = write_yaml(
        tmp_path,
        model,
        script,
        loraprune={"ratio": 0.3, "prune_every": 2, "ranking": "uniform"},
        **more,
    )
    ranks.run(2, run_script, [script, "--config", path], deepspeed)
    check_result(tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "more", "names"),
    [
        (["gkd"], {}, "sft dpo gkd"),
        (["sft"], {}, "--config"),
        (["sft", "--config"], {"use_peft": False}, "use_peft: True"),
        (["sft", "--config"], {"optim": "paged_adamw_8bit"}, "optim: adamw_torch"),
        (["dpo", "--config"], {"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        (["sft", "--config"], {"loraprune": {"ratoi": 0.3}}, "prune.ratoi"),
    ],
)
def test_what_cannot_be_pruned_is_one_line_before_a_model_is_loaded(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    more: dict[str, Any],
    names: str,
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # the command sets its own
    script = arguments[0] if arguments[0] in FIELDS else "sft"
    path = write_yaml(tmp_path, model, script, **more)
    if "--config" in arguments:
        arguments = [*arguments, path]
    with fresh_accelerate():
        must_name(names, main, arguments)


def test_the_command_is_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["trl.py", "gkd"])
    monkeypatch.delitem(sys.modules, "loraprune_ds.hf.trl")
    must_name("sft dpo gkd", runpy.run_module, "loraprune_ds.hf.trl", None, "__main__")
