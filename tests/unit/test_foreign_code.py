"""Code of a model folder never runs, and a copy of a folder takes known files only."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loraprune_ds.config import PruneConfig
from loraprune_ds.evaluate.speed import served_model
from loraprune_ds.export.formats import export as export_format
from loraprune_ds.export.huggingface import begin
from loraprune_ds.export.lora import find_source
from loraprune_ds.files import read_json, write_json
from loraprune_ds.hf import pruning
from loraprune_ds.hf.live import linear_names
from loraprune_ds.hf.pruning import Pruning
from loraprune_ds.model.family import LLAMA_LINEARS
from loraprune_ds.model.modeling_pruned import __file__ as OUR_FILE
from loraprune_ds.model.tokenizer import load_tokenizer
from loraprune_ds.model.weight_files import TOKENIZER_FILES, copy_named
from tests.export_cases import CASES, VOCAB, cut, dense_model, export, exported_config
from tests.oracle.models import make_tokenizer
from tests.refusals import refuses

PRUNED = next(case for case in CASES if case.becomes == "pruned_llama" and case.dtype == "float32")
STOCK = next(case for case in CASES if case.becomes == "llama")
PROMPT = torch.arange(24).view(2, 12) * 7 % VOCAB
ITS_CODE = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
pytestmark = pytest.mark.usefixtures("fresh_transformers")
MakeFolder = Callable[[str], Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeFolder]:
    """Makes a stock or a pruned model whose folder has code, which no test may run. Every question is answered yes."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    make_tokenizer(300).save_pretrained(tmp_path / "source")

    def make(kind: str) -> Path:
        case, folder = (PRUNED if kind == "pruned" else STOCK), tmp_path / kind
        export(dense_model(case), case, tmp_path / "source", folder)
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        for name in ("modeling_pruned.py", "theirs.py"):
            (folder / name).write_text(code)
        name_code(folder / "config.json", {auto: f"theirs.{auto}" for auto in ITS_CODE})
        return folder

    yield make
    assert not (tmp_path / "ran").exists()


def name_code(path: Path, auto_map: object) -> None:
    write_json(path, read_json(path) | {"auto_map": auto_map})


def code_for_the_tokenizer(folder: Path) -> None:
    """Names a tokenizer that only the folder has."""
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Theirs"})
    name_code(folder / "tokenizer_config.json", {"AutoTokenizer": ["theirs.Theirs", None]})


def test_vllm_gets_our_modelling_file_and_trusts_no_other(make: MakeFolder, tmp_path: Path) -> None:
    folder = make("pruned")
    served = served_model(str(folder), "hf", tmp_path / "served")
    assert served.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(served.path, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, cut(dense_model(PRUNED), PRUNED)(PROMPT).logits)
    weights = sorted(served.path.glob("*.safetensors"))
    assert weights
    assert all(path.is_symlink() and path.samefile(folder / path.name) for path in weights)
    stock = served_model(str(make("stock")), "hf", tmp_path / "other")
    assert not stock.trust_remote_code
    assert AutoConfig.from_pretrained(stock.path, trust_remote_code=stock.trust_remote_code).model_type == "llama"


def test_a_tokenizer_that_is_code_is_refused_in_one_line(make: MakeFolder, tmp_path: Path) -> None:
    """Nothing else would read the same tokens, so an export is refused as well."""
    folder = make("pruned")
    code_for_the_tokenizer(folder)
    for use in (load_tokenizer, lambda folder: plain_export(folder, tmp_path / "out")):
        refuses(r"its tokenizer is code of the folder, which is never run; .*$", use, folder)
    assert not (tmp_path / "out").exists()
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Theirs"})
    assert load_tokenizer(folder)("x").input_ids


def test_the_names_of_linears_need_no_code(make: MakeFolder, tmp_path: Path) -> None:
    folder = make("pruned")
    assert linear_names(folder) == linear_names(dense_model(PRUNED)) == [x.name.split(".")[-1] for x in LLAMA_LINEARS]
    write_json(folder / "config.json", read_json(folder / "config.json") | {"model_type": "theirs"})
    refuses("model_type 'theirs' is not supported", linear_names, folder)


def test_an_export_from_a_trainer_brings_no_code_of_its_tokenizer(
    make: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a trainer has run the tokenizer's code. Its export must not fail at the end for that."""
    folder, out = make("pruned"), tmp_path / "out"
    exported, dense, pruned = exported_config(dense_model(PRUNED), PRUNED)
    monkeypatch.setattr(pruning, "base_config", lambda _: exported.config)
    monkeypatch.setattr(pruning, "model_name", lambda _: "base")
    code_for_the_tokenizer(folder)
    tokenizer = SimpleNamespace(save_pretrained=lambda described: copy_named(folder, Path(described), TOKENIZER_FILES))
    base = SimpleNamespace(generation_config=None)
    training: Any = SimpleNamespace(
        peft_model=SimpleNamespace(get_base_model=lambda: base),
        model=SimpleNamespace(shape=pruned),
        pruner=SimpleNamespace(config=PruneConfig(), limits=SimpleNamespace(dense=dense)),
        dtype="float32",
        step=3,
    )
    begin(out)
    Pruning._finish_export(training, out, tokenizer)
    assert "auto_map" not in read_json(out / "tokenizer_config.json")
    assert load_tokenizer(out)("x").input_ids


STRAY = (".env", ".git/config", "theirs.py", "id.txt", "secrets.json", "optimizer.bin", "more/config.json")


def plain_export(folder: Path, out: Path) -> Path:
    export_format(find_source(folder), "hf", out)
    return out


@pytest.mark.parametrize("kind", ["stock", "pruned"])
def test_an_export_of_a_plain_folder_takes_known_files(make: MakeFolder, tmp_path: Path, kind: str) -> None:
    folder = make(kind)
    if kind == "stock":  # its tokenizer's class is one of transformers, whatever code the folder names
        name_code(folder / "tokenizer_config.json", {"AutoTokenizer": ["theirs.Theirs", None]})
    known = {path.name for path in folder.iterdir()} - {"theirs.py"} | {"LICENSE.txt", "preprocessor_config.json"}
    known -= {"modeling_pruned.py"} if kind == "stock" else set()
    (folder / "LICENSE.txt").write_text("as is")
    write_json(folder / "preprocessor_config.json", {"size": 8, "auto_map": {"AutoProcessor": "theirs.Theirs"}})
    for name in STRAY:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    (folder / "NOTICE").symlink_to(folder / "more", target_is_directory=True)
    (folder / "disk").symlink_to("/etc", target_is_directory=True)
    (folder / "passwd").symlink_to("/etc/passwd")
    out = plain_export(folder, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == known
    assert not any(path.is_symlink() for path in out.iterdir())
    assert read_json(out / "preprocessor_config.json") == {"size": 8}
    assert (out / "LICENSE.txt").read_text() == "as is"
    for path in out.glob("*.safetensors*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert "auto_map" not in read_json(out / "tokenizer_config.json")
    for text in ("The  import statement", "é\n"):
        assert AutoTokenizer.from_pretrained(out)(text).input_ids == load_tokenizer(folder)(text).input_ids
    config = read_json(out / "config.json")
    if kind == "stock":
        assert config == {key: x for key, x in read_json(folder / "config.json").items() if key != "auto_map"}
    else:
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_pruned.PrunedForCausalLM"
        assert (out / "modeling_pruned.py").read_text() == Path(OUR_FILE).read_text()


def test_an_export_of_a_folder_in_the_hub_s_cache_follows_its_links(make: MakeFolder, tmp_path: Path) -> None:
    """Every file of a snapshot is a link to a file without a name."""
    folder, blobs, snapshot = make("stock"), tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(i))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(i), snapshot))
    out = plain_export(snapshot, tmp_path / "out")
    left_out = {path.name for path in snapshot.iterdir()} - {path.name for path in out.iterdir()}
    assert left_out == {"modeling_pruned.py", "theirs.py"}
    assert not any(path.is_symlink() for path in out.iterdir())
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "llama"
