"""The scripts of launch/examples: results on two ranks load and agree with the live model; refusals are one line."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from loraprune_ds.files import read_json, write_json
from tests.oracle.models import make_tiny_llama
from tests.support import resuming
from tests.support.bad_input import assert_refused
from tests.support.callback_results import check_results, load, logits, relative
from tests.support.examples import ALONE, DS_CONFIG, OPTIONS, write_rows
from tests.support.families import heavy
from tests.support.launching import ROOT, run_to_end
from tests.support.ranks import RankPool
from tests.support.refusals import edit_tensors
from tests.support.trainers import run_example

SCRIPTS = {
    "sft.py": ("text",),
    "dpo.py": ("prompt", "chosen", "rejected"),
    "gkd.py": ("prompt",),
    "accelerate_loop.py": ("text",),
}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}
QLORA: dict[str, list[str]] = {
    "qlora.py": [],
    "dpo.py": [
        "--model_init_kwargs",
        json.dumps({"quantization_config": FOUR_BITS, "dtype": "bfloat16"}),
    ],
}
LENGTHS = {"gkd.py": ["--max_completion_length", "16"], "accelerate_loop.py": []}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(
        tmp_path_factory.mktemp("model"), heads=8, kv_heads=4, hidden=64, ffn=640, layers=4
    )


@pytest.mark.heavy  # test_fsdp has two in CI
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_prunes_and_what_it_writes_agrees(
    ranks: RankPool, model: Path, tmp_path: Path, script: str
) -> None:
    out, data = tmp_path / "out", str(write_rows(tmp_path / "rows.jsonl", SCRIPTS[script]))
    own_loop = script == "accelerate_loop.py"
    options = [str(out), DS_CONFIG] if own_loop else ["--output_dir", str(out), *OPTIONS.split()]
    options += LENGTHS.get(script, ["--max_length", "32"])
    ids = torch.arange(3, 35)[None]
    live = ranks.run(2, run_example, script, [str(model), data, *options], ids)[0]
    check_results(model, out, ids, live, has_adapter=not own_loop)
    assert own_loop or list((out / "runs/pruning").iterdir())


@pytest.mark.parametrize("script", ["qlora.py", heavy("dpo.py")])
def test_on_a_base_in_4_bits_the_export_agrees(
    ranks: RankPool, model: Path, tmp_path: Path, script: str
) -> None:
    """The reference of DPO is the pruned base, which stays in 4 bits."""
    data = write_rows(tmp_path / "rows.jsonl", SCRIPTS.get(script, ("text",)))
    options = [*ALONE.split(), "--max_length", "32", *QLORA[script]]
    options += ["--output_dir", str(tmp_path / "out"), "--activation_checkpointing", "true"]
    ids = torch.arange(3, 35)[None]
    arguments = [str(model), str(data), *options]
    (live,) = ranks.run(1, run_example, script, arguments, ids, False)
    exported = load(tmp_path / "out/model", "bfloat16")
    assert "quantization_config" not in read_json(tmp_path / "out/model/config.json")
    assert exported.num_parameters() < load(model).num_parameters()
    # merging rounds to bf16, 2⁻⁹ of a weight
    assert relative(logits(exported, ids), live) < 2e-2


def test_layers_that_do_least_are_dropped_and_a_run_prunes_the_rest(
    ranks: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Layers 2 and 3 of five add little to the hidden states."""
    run = resuming.write_run(
        tmp_path, train={"steps": 2}, prune={"prune_every": 1}, checkpoint={"every": None}
    )
    make_tiny_llama(tmp_path / "dense", heads=8, kv_heads=4, hidden=64, ffn=93, layers=5)
    idle = [
        f"model.layers.{i}.{name}.weight"
        for i in (2, 3)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    edit_tensors(lambda tensors: [tensors[name].mul_(0.01) for name in idle])(tmp_path / "dense")
    arguments = [str(tmp_path / name) for name in ("dense", "text.txt", "smaller")]
    monkeypatch.setattr(sys, "argv", ["drop_layers.py", *arguments, "2"])
    runpy.run_path(str(ROOT / "launch/examples/drop_layers.py"), run_name="__main__")
    assert sorted(capsys.readouterr().out.split("\n")) == ["", "drops layer 2", "drops layer 3"]
    dense, smaller = (resuming.read_tensors(tmp_path / name) for name in ("dense", "smaller"))
    expected = {name: dense[name.replace("layers.2.", "layers.4.")] for name in smaller}
    resuming.assert_equal_tensors(smaller, expected)
    settings = f"model.path={tmp_path / 'smaller'}", "deepspeed=null"
    assert ranks.run(
        1, resuming.run_here, resuming.config_for(run, tmp_path / "out", *settings)
    ) == [True]
    assert len(read_json(tmp_path / "out/kept_groups.json")["layers"]) == 3


@pytest.mark.parametrize(
    ("config", "text", "named"),
    [
        (None, "text", "{model}/config.json"),
        ({}, None, "{text}"),
        ({"auto_map": {}}, "text", "{model}"),
    ],
)
def test_what_cannot_be_quantised_is_one_line(
    config: object, text: str | None, named: str, tmp_path: Path
) -> None:
    model, path = tmp_path / "model", tmp_path / "text.txt"
    if config is not None:
        write_json(model / "config.json", config)
    if text is not None:
        path.write_text(text)
    command = [
        sys.executable,
        str(ROOT / "launch/examples/quantise.py"),
        str(model),
        str(path),
        "out",
    ]
    assert_refused(run_to_end(command, cwd=tmp_path), named.format(model=model, text=path), code=1)
