"""llm-compressor quantises a pruned model to W4A16 in groups of 64, by the shipped example. See tests/run_heavy.sh."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from safetensors.torch import load_file

from loraprune_ds.pretrained.sources import embedded_model_dir
from tests.integration.heavy.results import ask, python_of
from tests.integration.heavy.smollm2 import SIZES, write
from tests.support.export_cases import Case
from tests.support.launching import ROOT, run_to_end

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

EXAMPLE = str(ROOT / "launch/examples/quantise.py")
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
    python = python_of("QUANTISE_PYTHON")
    case = Case("pruned", "llama", SIZES, [(HEADS, CHANNELS)] * LAYERS, "llama", "bfloat16")
    write(case, tmp_path / "pruned", LAYERS)
    (tmp_path / "text.txt").write_text(
        "\n\n".join(topics[name] for name in sorted(topics))[:40_000]
    )

    options = ["--group-size", str(GROUP), "--samples", "8", "--window", "256"]
    ask(python, EXAMPLE, "pruned", "text.txt", "w4a16", *options, cwd=tmp_path)

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

    whole, quantised = map(
        float, ask(python, "-c", LOSS, "text.txt", "pruned", "w4a16", cwd=tmp_path).stdout.split()
    )
    assert abs(quantised - whole) < TOLERANCE, (whole, quantised)


def test_widths_that_the_group_does_not_divide_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    command = [python_of("QUANTISE_PYTHON"), EXAMPLE, str(embedded_model_dir()), "text.txt", "out"]
    ended = run_to_end(command, cwd=tmp_path, environment={"PYTHONPATH": ""})
    assert ended.code == 1
    assert (
        ended.err.splitlines()[-1]
        == "error: --group-size 128 does not divide a width of 576; try 64"
    )
