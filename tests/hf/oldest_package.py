"""What someone with older versions installed can do, for `bash tests/oldest.sh`: it needs neither DeepSpeed nor TRL."""

import importlib
import os
import pkgutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import loraprune_ds
from loraprune_ds import LoraPruneCallback, PruneConfig, Pruning, lora_config, prepare_model
from loraprune_ds.generate.models import open_result
from loraprune_ds.session.preparing import linear_names
from tests.oracle.models import make_batches, make_tiny_llama
from tests.support.examples import write_rows
from tests.support.launching import ROOT, free_port
from tests.support.local_training import make_model, train_and_save
from tests.support.qlora import DOUBLE, load, with_lora

PRUNE = PruneConfig(ratio=0.3, prune_every=2, channel_multiple=1)
SIZES: dict[str, Any] = {"layers": 6, "ffn": 256, "vocab": 300}

TOOLS = {
    "loraprune_ds.zero.": "deepspeed",
    "loraprune_ds.hf.axolotl": "axolotl",
    "loraprune_ds.hf.llama_factory": "llamafactory",
    "loraprune_ds.hf.swift": "swift",
}


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "dense", **SIZES)


def loads(folder: Path, kind: Any = AutoModelForCausalLM) -> None:
    model = kind.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.tensor([[1, 2, 3]])
    assert model(input_ids=tokens, labels=tokens).loss.isfinite()


def test_every_module_imports() -> None:
    """All but those of a tool that is not installed."""
    missing = tuple(module for module, tool in TOOLS.items() if not find_spec(tool))
    for module in pkgutil.walk_packages(loraprune_ds.__path__, "loraprune_ds."):
        if not module.name.startswith(missing):
            importlib.import_module(module.name)


def test_the_callback_trains_saves_and_loads(dense: Path, tmp_path: Path) -> None:
    model = make_model(dense)
    callback = LoraPruneCallback(PRUNE)
    rows: Any = [{"input_ids": ids, "labels": ids} for batch, _ in
            make_batches(steps=8, samples=2, tokens=8, vocab=97, seed=3) for ids in batch]  # fmt: skip
    args = TrainingArguments(str(tmp_path / "out"), max_steps=8, per_device_train_batch_size=2,
                             save_steps=4, report_to=[], use_cpu=True)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = Trainer(
        model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=callback.resume(trainer.model))
    assert callback.reached > 0.25
    callback.save_model(tmp_path / "model")
    loads(tmp_path / "model")
    assert open_result(str(tmp_path / "model"))
    assert (tmp_path / "out" / "checkpoint-8" / "pruning").is_dir()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loop", ["accelerate_loop", "fsdp_loop"])
def test_loops_on_ddp_and_fsdp2(dense: Path, tmp_path: Path, loop: str, ranks: int) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ("text",))
    start = [sys.executable, "-m", "torch.distributed.run", f"--master_port={free_port()}"]
    command = [*start, f"--nproc_per_node={ranks}", f"launch/examples/{loop}.py"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    subprocess.run(
        [*command, str(dense), str(rows), str(tmp_path / "out")], check=True, cwd=ROOT, env=env
    )
    loads(tmp_path / "out" / "model")


def test_a_t5_is_saved_and_loaded(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=6, num_heads=4)  # fmt: skip
    config.decoder_start_token_id = 0
    base = prepare_model(T5ForConditionalGeneration(config))
    linears = linear_names(base)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=linears)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pruning = Pruning(model, optimizer, PRUNE, 4)
    for ids, _ in make_batches(steps=4, samples=4, tokens=8, vocab=97, seed=3):
        pruning.begin_step()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruning.end_step()
    pruning.save_model(tmp_path / "model")
    loads(tmp_path / "model", AutoModelForSeq2SeqLM)


def test_a_base_in_4_bits_is_saved_and_loaded(tmp_path: Path) -> None:
    folder = make_tiny_llama(
        tmp_path / "dense", layers=6, hidden=64, heads=8, kv_heads=4, ffn=96, dtype="bfloat16"
    )
    train_and_save(with_lora(load(folder, DOUBLE)).train(), PRUNE, tmp_path)
    loads(tmp_path / "live")


def test_a_mixture_is_saved_and_loaded(tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=6,
                           num_attention_heads=4, num_key_value_heads=2, num_local_experts=6)  # fmt: skip
    base = prepare_model(MixtralForCausalLM(config))
    model: Any = get_peft_model(base, lora_config(base, r=4)).train()
    train_and_save(model, PRUNE, tmp_path)
    loads(tmp_path / "live")
