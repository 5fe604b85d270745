"""Runs launch/export.py on a tiny run, and gives every format to the library that reads it."""

import io
import json
import shutil
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoTokenizer

from loraprune_ds.cli.export import main
from loraprune_ds.config import LoraConfig
from loraprune_ds.pretrained.adapters import check_adapter
from loraprune_ds.pretrained.pretrained import open_pretrained
from tests.support.bad_input import assert_refused
from tests.support.callback_results import load, logits
from tests.support.launching import ROOT, Ended, fork_ranks, read_json, run_to_end
from tests.support.refusals import edit
from tests.support.resuming import assert_equal_tensors, read_tensors

EXPORT = ROOT / "launch" / "export.py"
STEPS = 6
PROMPT = torch.arange(60).view(3, 20) * 7 % 300
SAME = 1e-5  # in fp32: the adapter adds LoRA in another order than the merge


@pytest.fixture(scope="session")
def run(finished: Path) -> Path:
    return finished / "run"


def export(*arguments: str | Path) -> Ended:
    """Runs the command of launch/export.py in this process, which has the imports already."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(EXPORT), *map(str, arguments)])
        code = main()
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - began)


def exported(source: Path, name: str, out: Path) -> Path:
    ended = export(source, "--format", name, "--out", out)
    assert ended.code == 0, ended.everything
    assert ended.out.splitlines()[-1] == f"{name}: {out}"
    assert not list(out.parent.glob(".*.partial"))
    return out


@pytest.fixture(scope="session")
def adapter(run: Path) -> Path:
    return exported(run, "adapter", run.parent / "adapter")


def test_base_and_adapter_give_the_merged_model(run: Path, adapter: Path) -> None:
    base = load(adapter / "base")
    without = logits(base, PROMPT)
    model = PeftModel.from_pretrained(base, str(adapter / "adapter"))
    merged = logits(load(run / "model"), PROMPT)
    torch.testing.assert_close(logits(model, PROMPT), merged, rtol=0, atol=SAME)
    assert (without - merged).abs().max() > 100 * SAME, "the LoRA has to matter"
    again = model.merge_and_unload()
    for name, tensor in read_tensors(run / "model").items():
        torch.testing.assert_close(again.get_parameter(name).detach(), tensor, rtol=0, atol=1e-6)
    # a run can start so
    check_adapter(adapter / "adapter", LoraConfig(r=4), open_pretrained(adapter / "base").shape)


def test_the_finished_model_is_copied(run: Path, tmp_path: Path) -> None:
    """Starts a process. It prints one line. The result is in the folder it was started from."""
    ended = run_to_end([sys.executable, str(EXPORT), str(run)], cwd=tmp_path)
    assert (ended.code, ended.out, ended.err) == (0, "hf: run-hf\n", ""), ended.everything
    out = tmp_path / "run-hf"
    copied, original = (
        {path.name: path.read_bytes() for path in each.iterdir()} for each in (out, run / "model")
    )
    assert copied == original


def test_the_last_checkpoint_is_the_finished_model(run: Path, tmp_path: Path) -> None:
    out = exported(run / "checkpoints" / f"step-{STEPS}", "hf", tmp_path / "hf")
    assert read_json(out / "config.json") == read_json(run / "model" / "config.json")
    assert_equal_tensors(read_tensors(out), read_tensors(run / "model"))


@pytest.fixture
def unfinished(run: Path, tmp_path: Path) -> Path:
    """Takes the run back to step 4."""
    folder = tmp_path / "unfinished"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS}")
    status = read_json(folder / "status.json") | {"state": "stopped", "step": 4}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def test_an_unfinished_run_gives_its_newest_checkpoint(
    run: Path, unfinished: Path, tmp_path: Path
) -> None:
    ended = export(unfinished, "--out", tmp_path / "hf")
    assert ended.code == 0, ended.everything
    assert "taken from step-4" in ended.out
    shape, last = (open_pretrained(folder).shape for folder in (tmp_path / "hf", run / "model"))
    dense = open_pretrained(run.parent / "dense").shape
    assert dense.linear_numel() > shape.linear_numel() > last.linear_numel()
    assert torch.isfinite(logits(load(tmp_path / "hf"), PROMPT)).all()
    tokens = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)(
        "the import statement"
    ).input_ids
    assert (
        tokens
        == AutoTokenizer.from_pretrained(run.parent / "dense")("the import statement").input_ids
    )
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "4 optimizer steps" in card
    assert (
        f"| perplexity | {read_json(run / 'report.json')['perplexity']['dense']:.2f} | not measured | |"
        in card
    )
    exported(unfinished, "gguf-f16", tmp_path / "gguf")
    assert {path.name for path in (tmp_path / "gguf").iterdir()} == {
        "README.md",
        "unfinished-f16.gguf",
    }


def test_a_damaged_checkpoint_is_passed_over(run: Path, unfinished: Path, tmp_path: Path) -> None:
    steps = unfinished / "checkpoints"
    shutil.copytree(steps / "step-4", steps / "step-5")
    (steps / "step-5" / "lora-00001.safetensors").write_bytes(b"")
    ended = export(unfinished, "--out", tmp_path / "hf")
    assert ended.code == 0, ended.everything
    assert "step-5 cannot be used" in ended.out
    assert "taken from step-4" in ended.out
    (steps / "step-4" / "lora-00001.safetensors").write_bytes(b"")
    assert_refused(export(unfinished, "--out", tmp_path / "again"), "lora-00001.safetensors")


def test_every_format_has_the_same_card(run: Path, adapter: Path, tmp_path: Path) -> None:
    report = read_json(run / "report.json")
    gguf = exported(run, "gguf-q8_0", tmp_path / "gguf")
    reader = GGUFReader(gguf / "run-q8_0.gguf")
    assert len(reader.tensors) == len(read_tensors(run / "model"))
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q8_0
    how = {
        run / "model": "LoRA merged",
        adapter: "PeftModel.from_pretrained",
        gguf: 'Llama("path/to/run-q8_0.gguf")',
    }
    for folder, words in how.items():
        card = (folder / "README.md").read_text()
        parameters = report["measured"]["values"]["parameters"]
        for number in (parameters["dense"], parameters["value"]):
            assert f"{number:,.0f}" in card
        assert f"{report['measured']['removed']:.2%}" in card
        for name in ("dense", "pruned"):
            assert f"{report['perplexity'][name]:.2f}" in card
        assert f"{STEPS} optimizer steps" in card
        assert words in card
        assert card.count("## Load it") == 1


def test_bad_input_is_one_line(run: Path, unfinished: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    assert_refused(export(tmp_path, "--out", out), str(tmp_path))
    assert_refused(export(run, "--out", "/proc/nowhere/out"), "/proc/nowhere/out")
    with pytest.MonkeyPatch.context() as patch:
        no_room = Mock(
            side_effect=SafetensorError("Error while serializing: No space left on device")
        )
        patch.setattr("loraprune_ds.pretrained.weight_files.write_weight_file", no_room)
        assert_refused(export(unfinished, "--out", out), str(out), "No space left", code=1)
    assert_refused(export(run / "model", "--format", "adapter", "--out", out), "model", "LoRA")
    assert_refused(export(run, "--out", unfinished), str(unfinished))
    assert_refused(export(run, "--mtp", "dense", "--out", out), "--mtp was removed")
    shutil.rmtree(unfinished / "checkpoints")
    assert_refused(export(unfinished, "--out", out), "stopped at step 4 of 6")
    shutil.copytree(run / "model", model)
    (model / "tokenizer.json").unlink()
    assert_refused(export(model, "--format", "gguf-f16", "--out", out), "tokenizer")
    next(model.glob("*.safetensors")).write_bytes(b"no")
    assert_refused(export(model, "--out", out), ".safetensors")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_finished_run_below_its_ratio_exits_with_3_after_all_stages(
    finished: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(finished / "run", tmp_path / "out")
    edit("status.json", error="the run ends with 18.8 %")(out)
    given = ["--config", str(finished / "run.yaml"), "--set", f"output_dir={out}"]
    (ended,) = fork_ranks(given, tmp_path, cwd=finished)
    assert (ended.code, "18.8 %" in ended.err, "\nparameters " in ended.out) == (3, True, True)
