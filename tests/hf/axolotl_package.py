"""Axolotl prunes by a block in its YAML, and its next commands work with that YAML. By hand: tests/axolotl.sh"""

import os
import shutil
import signal
import subprocess
import sys
import time
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
from tests.support.examples import DS_CONFIG, write_rows
from tests.support.launching import ROOT
from tests.support.resuming import read_tensors

OFFLINE = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
PLUGIN = "loraprune_ds.hf.axolotl.LoraPrunePlugin"
# What Axolotl's examples/llama-3/lora-1b.yml has, apart from CHANGED
EXAMPLE: dict[str, Any] = {
    "adapter": "lora",
    "sample_packing": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "lora_target_modules": [
        *("gate_proj", "down_proj", "up_proj", "q_proj", "v_proj", "k_proj", "o_proj")
    ],
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "tf32": False,
    "gradient_checkpointing": True,
    "logging_steps": 1,
    "loss_watchdog_threshold": 5.0,
    "loss_watchdog_patience": 3,
    "warmup_ratio": 0.1,
    "weight_decay": 0.0,
}
# the model and the data of a test; what CPUs lack: flash attention and bf16. The optimizer, which pruning refuses
CHANGED: dict[str, Any] = {
    "sequence_len": 512,
    "eval_sample_packing": False,
    "val_set_size": 0.1,
    "micro_batch_size": 1,
    "optimizer": "adamw_torch",
    "attn_implementation": "sdpa",
    "bf16": False,
    "fp16": False,
    "max_steps": 8,
    "save_steps": 4,
    "loss_watchdog_threshold": 50.0,
    "dataset_num_proc": 1,
}
OURS: dict[str, Any] = {"plugins": [PLUGIN], "loraprune": {"ratio": 0.3, "prune_every": 2}}
QLORA = {"adapter": "qlora", "load_in_4bit": True}
# Axolotl itself does not bring back the order of packed samples.
REPEATABLE: dict[str, Any] = {"sample_packing": False, "lora_dropout": 0.0}
# On CPU ranks DeepSpeed must start first, and the Trainer must know that there is no GPU.
CPU_RANKS = """import deepspeed
from axolotl.integrations.base import BasePlugin

class Plugin(BasePlugin):
    def register(self, cfg):
        deepspeed.init_distributed("gloo")

    def get_training_args(self, cfg):
        return {"use_cpu": True}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(
        tmp_path_factory.mktemp("model"), heads=8, kv_heads=4, hidden=64, ffn=640, layers=4
    )


def write_yaml(folder: Path, model: Path, **more: Any) -> str:
    rows = write_rows(folder / "rows.jsonl", ("instruction", "input", "output"))
    where = {
        "base_model": str(model),
        "datasets": [{"path": str(rows), "type": "alpaca", "ds_type": "json"}],
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    path = folder / "x.yaml"
    path.write_text(yaml.safe_dump(EXAMPLE | CHANGED | OURS | where | more))
    return str(path)


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    python_path = os.pathsep.join((str(ROOT), str(folder)))
    return os.environ | OFFLINE | {"PATH": path, "PYTHONPATH": python_path}


def axolotl(folder: Path, *arguments: str, text: str = "", code: int = 0) -> str:
    done = subprocess.run(
        ["axolotl", *arguments],
        cwd=folder,
        env=environment(folder),
        input=text,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert (done.returncode != 0) == bool(code), done.stdout[-4000:]
    return done.stdout


ALONE = ("--launcher", "python")


def merge_and_compare(path: str, adapter: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Merges by both of their ways. Each equals our export of the same step."""
    ours = tmp_path / f"ours-{adapter.name}"
    export(find_contents(checkpoint), "hf", ours)
    expected = read_tensors(ours)
    for way in ("legacy", "memory_efficient"):
        out = tmp_path / f"{way}-{adapter.name}"
        options = ("--lora-model-dir", str(adapter), "--output-dir", str(out))
        told = axolotl(tmp_path, "merge-lora", path, *options, "--merge-method", way)
        assert "takes the place of base_model" in told
        load(out / "merged")
        merged = read_tensors(out / "merged")
        assert merged.keys() == expected.keys()
        for name, tensor in merged.items():
            # one product of LoRA in fp32, which PEFT sums in another order
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("ranking", ["global", "uniform"])
def test_their_example_prunes_and_both_merges_equal_ours(
    model: Path, tmp_path: Path, ranking: str
) -> None:
    path = write_yaml(tmp_path, model, loraprune=OURS["loraprune"] | {"ranking": ranking})
    told = axolotl(tmp_path, "train", path, *ALONE)
    assert "lora_mlp_kernel are off" in told
    assert told.index("30.0 % of the layers' linears") < told.index("'loss'")
    out = tmp_path / "out"
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    merge_and_compare(path, out, out / "checkpoint-8", tmp_path)
    merge_and_compare(path, out / "checkpoint-4", out / "checkpoint-4", tmp_path)
    said = axolotl(tmp_path, "inference", path, "--lora-model-dir", str(out), text="the cat sat")
    assert "the cat sat" in said
    assert "another pruning" in axolotl(tmp_path, "train", path, *ALONE, code=1)


def test_qlora_is_merged_without_another_pass_through_four_bits(
    model: Path, tmp_path: Path
) -> None:
    path = write_yaml(tmp_path, model, **QLORA)
    axolotl(tmp_path, "train", path, *ALONE)
    merge_and_compare(path, tmp_path / "out", tmp_path / "out/checkpoint-8", tmp_path)


def test_a_resume_by_its_own_setting_changes_no_bit(model: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path, model, **REPEATABLE)
    axolotl(tmp_path, "train", path, *ALONE)
    resume_and_compare(path, tmp_path, *ALONE)


def resume_and_compare(path: str, tmp_path: Path, *launch: str) -> None:
    """Goes on from the fourth step. Each bit equals the training that went on at once."""
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "out/checkpoint-4", again / "checkpoint-4")
    options = ("--output-dir", str(again), "--auto-resume-from-checkpoints")
    axolotl(tmp_path, "train", path, *options, *launch)
    tensors: list[dict[str, torch.Tensor]] = []
    for out in (again, tmp_path / "out"):
        export(find_contents(out / "checkpoint-8"), "hf", out / "step")
        tensors.append(read_tensors(out / "step"))
    first, second = tensors
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("deepspeed", [False, True])
def test_two_ranks_prune_and_resume_on_ddp_and_zero_3(
    model: Path, tmp_path: Path, deepspeed: bool
) -> None:
    more = dict(REPEATABLE)
    launch = ("--launcher", "accelerate", "--", "--num_processes", "2", "--cpu")
    if deepspeed:
        (tmp_path / "cpu_ranks.py").write_text(CPU_RANKS)
        more |= {"plugins": ["cpu_ranks.Plugin", PLUGIN], "deepspeed": str(ROOT / DS_CONFIG)}
        launch = ("--launcher", "torchrun", "--", "--nproc_per_node", "2")
    path = write_yaml(tmp_path, model, **more)
    axolotl(tmp_path, "train", path, *launch)
    out = tmp_path / "out"
    assert len(read_json(out / "report.json")["prune_steps"]) >= 2
    resume_and_compare(path, tmp_path, *launch)
    if (
        not deepspeed
    ):  # Axolotl itself leaves an empty adapter at times, of a dense model on CPU ranks, too
        merge_and_compare(path, out, out / "checkpoint-8", tmp_path)


def test_after_ctrl_c_its_merge_names_the_checkpoint_to_take(model: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path, model, max_steps=500)
    command = ["axolotl", "train", path, *ALONE]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), start_new_session=True
    )
    out = tmp_path / "out"
    while not (out / "checkpoint-8/pruning").exists():
        assert running.poll() is None
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGINT)
    running.wait(60)
    told = axolotl(tmp_path, "merge-lora", path, code=1)
    assert "take the newest checkpoint-N" in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit optimizer: adamw_torch"),
        ({"adapter": None}, "adapter: None adapter: lora"),
        ({"peft_use_dora": True}, "peft_use_dora"),
        ({"loraprune": {"ratoi": 0.3}}, "unknown key prune.ratoi"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "lora_target_modules lacks down_proj"),
        ({"lora_target_linear": True, "lora_target_modules": None, "max_steps": 3}, ""),
    ],
)
def test_what_cannot_be_pruned_is_the_last_line_before_a_model_is_loaded(
    model: Path, tmp_path: Path, more: dict[str, Any], names: str
) -> None:
    path = write_yaml(tmp_path, model, **more)
    told = axolotl(tmp_path, "train", path, *ALONE, code=int(bool(names)))
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert not names or all(name in errors[0] for name in names.split()), told[-2000:]
    assert not names or "Loading model" not in told
