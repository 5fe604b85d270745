"""llm-compressor quantises a pruned model to W4A16 in groups of 64, by the shipped example. See tests/run_heavy.sh."""

import json
import os
import subprocess
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraprune_ds.model.embedded import embedded_model_dir
from tests.export_cases import Case, export
from tests.integration.heavy.smollm2 import SIZES
from tests.integration.launching import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

LAYERS, GROUP = 4, 64  # SmolLM2's hidden size of 576 is no multiple of 128
HEADS, CHANNELS = 2, 1280
# In nats, on the text that it was calibrated on. It was 0.07. With each scale taken from the next group it was 0.46.
TOLERANCE = 0.15
LOSS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(open(sys.argv[1]).read(), return_tensors="pt").input_ids[:, :512]
    with torch.no_grad():
        print(model(input_ids=ids, labels=ids).loss.item())
"""


def test_a_pruned_model_keeps_its_loss_at_4_bits(tmp_path: Path) -> None:
    python = os.environ.get("QUANTISE_PYTHON")
    if not python:
        pytest.skip("QUANTISE_PYTHON names no Python with llm-compressor: bash tests/run_heavy.sh --quantise")
    source = embedded_model_dir()
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    dense.model.layers = dense.model.layers[:LAYERS]
    dense.config.num_hidden_layers = LAYERS
    case = Case("pruned", "llama", SIZES, [(HEADS, CHANNELS)] * LAYERS, "llama", "bfloat16")
    export(dense, case, source, tmp_path / "pruned")
    (tmp_path / "text.txt").write_text("\n\n".join(topics[name] for name in sorted(topics))[:40_000])

    def start(*arguments: str) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    example = str(ROOT / "launch/examples/quantise.py")
    start(example, "pruned", "text.txt", "w4a16", "--group-size", str(GROUP), "--samples", "8", "--window", "256")

    config = json.loads((tmp_path / "w4a16/config.json").read_text())
    assert config["num_key_value_heads"] == HEADS
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["type"]) == (4, GROUP, "int")
    tensors = load_file(tmp_path / "w4a16/model.safetensors")
    for i in range(LAYERS):
        down = f"model.layers.{i}.mlp.down_proj"
        assert f"{down}.weight" not in tensors
        assert tensors[f"{down}.weight_packed"].shape == (576, CHANNELS // 8)
        assert tensors[f"{down}.weight_scale"].shape == (576, CHANNELS // GROUP)

    whole, quantised = map(float, start("-c", LOSS, "text.txt", "pruned", "w4a16").split())
    assert abs(quantised - whole) < TOLERANCE, (whole, quantised)


def test_widths_that_the_group_does_not_divide_are_one_line(tmp_path: Path) -> None:
    python = os.environ.get("QUANTISE_PYTHON")
    if not python:
        pytest.skip("QUANTISE_PYTHON names no Python with llm-compressor: bash tests/run_heavy.sh --quantise")
    (tmp_path / "text.txt").write_text("text")
    done = subprocess.run(
        [python, str(ROOT / "launch/examples/quantise.py"), str(embedded_model_dir()), "text.txt", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: --group-size 128 does not divide a width of 576; try 64"
