"""The scripts of launch/examples on two ranks: their results load, and agree with the live model."""

import json
from pathlib import Path

import pytest
import torch

from tests.hf.results import check_results
from tests.hf.trainers import run_example
from tests.oracle.models import make_tiny_llama
from tests.ranks import RankPool

SCRIPTS = {"sft.py": ("text",), "dpo.py": ("prompt", "chosen", "rejected"), "accelerate_loop.py": ("text",)}
DS_CONFIG = "ds_configs/zero3.json"
OPTIONS = f"""--ratio 0.3 --prune_every 2 --max_steps 5 --deepspeed {DS_CONFIG} --use_cpu true --bf16 false
--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 1e-3 --max_length 32
--report_to tensorboard --logging_steps 1 --save_strategy no --disable_tqdm true"""
WORDS = "the cat sat on a mat while it rained and the dog ran home".split()


def write_rows(path: Path, fields: tuple[str, ...]) -> Path:
    def sentence(i: int) -> str:
        return " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))

    rows = ({field: sentence(3 * i + j) for j, field in enumerate(fields)} for i in range(16))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    return make_tiny_llama(folder, heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=640, layers=4, vocab=97, seed=1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_prunes_and_what_it_writes_agrees(ranks: RankPool, model: Path, tmp_path: Path, script: str) -> None:
    out, data = tmp_path / "out", str(write_rows(tmp_path / "rows.jsonl", SCRIPTS[script]))
    own_loop = script == "accelerate_loop.py"
    options = [str(out), DS_CONFIG] if own_loop else ["--output_dir", str(out), *OPTIONS.split()]
    ids = torch.arange(3, 35)[None]
    live = ranks.run(2, run_example, script, [str(model), data, *options], ids)[0]
    check_results(model, out, ids, live, has_adapter=not own_loop)
    assert own_loop or list((out / "runs/pruning").iterdir())
