"""Converts `.bin` files to the same tensors as safetensors: once, and whole or not at all."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraprune_ds.config import ModelConfig
from loraprune_ds.model import hub
from loraprune_ds.model.hub import BIN_FILE, BIN_INDEX, converted, locate_model
from loraprune_ds.model.pretrained import open_pretrained
from loraprune_ds.model.weight_files import write_weight_file
from tests.oracle.models import make_tiny_llama
from tests.refusals import refused, refuses

THIRD = "pytorch_model-00003-of-00003.bin"  # of an older download
FILES = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "loraprune_ds" / "converted"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Writes two `.bin` files and their index, as transformers saved them."""
    folder = make_tiny_llama(tmp_path / "model", ffn=37, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = dict(zip(FILES, (names[::2], names[1::2]), strict=True))
    for file, members in halves.items():
        torch.save({name: tensors[name] for name in members}, folder / file)
    weight_map = {name: file for file, members in halves.items() for name in members}
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in FILES for name, tensor in torch.load(folder / file).items()}


def written(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.bfloat16 for name in expected)


def test_the_same_tensors(folder: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "secrets.json").write_text("{}")
    mapped = []

    def write(*given: Any) -> dict[str, int]:
        mapped.extend(name for name in FILES if f"{folder / name}\n" in Path("/proc/self/maps").read_text())
        return write_weight_file(*given)

    monkeypatch.setattr(hub, "write_weight_file", write)
    found = locate_model(ModelConfig(str(folder)))
    assert mapped == list(FILES)  # one at a time
    assert set(open_pretrained(found).weights.files) == set(tensors)
    assert_same(written(found), tensors)
    assert (found / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not any((found / name).exists() for name in (BIN_INDEX, "secrets.json"))  # only known files are copied


def test_tensors_that_share_memory_in_one_file_without_an_index(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Saves a tied head, as torch does, as a second name of the embedding."""
    for name in (*FILES, BIN_INDEX):
        (folder / name).unlink()
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"]
    torch.save(tensors, folder / BIN_FILE)
    assert_same(written(converted(folder)), tensors)


def test_other_weights_are_another_folder(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Keeps names and sizes, and changes one element."""
    first = converted(folder)
    changed = torch.load(folder / FILES[0])
    next(iter(changed.values())).view(-1)[3] += 1
    torch.save(changed, folder / FILES[0])
    second = converted(folder)
    assert second != first
    assert_same({name: written(second)[name] for name in changed}, changed)


def _convert_in_a_process(folder: Path, results: Any) -> None:
    made = []
    original = hub._convert
    hub._convert = lambda *given: (made.append(1), original(*given))  # type: ignore[assignment]
    results.put((str(converted(folder)), len(made)))


def test_of_several_processes_one_converts(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    processes = [context.Process(target=_convert_in_a_process, args=(folder, results)) for _ in range(4)]
    for process in processes:
        process.start()
    paths, counts = zip(*(results.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert (len(set(paths)), sum(counts)) == (1, 1)


def test_nothing_is_left_of_a_conversion_that_failed(folder: Path, cache: Path, monkeypatch: Any) -> None:
    calls = []

    def fail_at_the_second(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return {}

    monkeypatch.setattr(hub, "write_weight_file", fail_at_the_second)
    refuses(r"cannot be converted to safetensors in .* No space left on device", converted, folder)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


class _Code:
    def __reduce__(self) -> Any:
        return print, ("a checkpoint must not run code",)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"data.pkl") + 100] ^= 255
    path.write_bytes(content)


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_bytes(path.read_bytes()[:-200]), f"{FILES[1]} "),
    (lambda path: torch.save(_Code(), path), " holds something other than tensors"),
    (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), " is damaged, or older than torch 1.6;"),
    (_flip_a_bit, f"{FILES[1]} "),
    (lambda path: torch.save([1, 2], path), " must hold a dictionary of tensors"),
    (lambda path: shutil.copy(path.with_name(FILES[0]), path), f": lm_head.weight is in {FILES[0]}, too"),
    (Path.unlink, f" is missing; {BIN_INDEX} names it"),
    (lambda path: shutil.copy(path, path.with_name(THIRD)), f"{THIRD} is one weight file too many;"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damage_is_one_line(folder: Path, damage: Callable[[Path], object], message: str, capfd: Any) -> None:
    damage(folder / FILES[1])
    assert message in refused(locate_model, ModelConfig(str(folder))).replace(f"{folder}/", "")
    assert "must not run" not in capfd.readouterr().out


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_a_hub_model_is_downloaded_in_one_format(
    folder: Path, tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: Any, has_safetensors: bool
) -> None:
    snapshot = tmp_path / "snapshot"
    if has_safetensors:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repository, revision) == ("some/model", "main")
        snapshot.mkdir(exist_ok=True)
        for path in (path for pattern in allow_patterns for path in folder.glob(pattern)):
            shutil.copy(path, snapshot)
        return str(snapshot)

    monkeypatch.setattr(hub, "snapshot_download", download)
    found = locate_model(ModelConfig("some/model", revision="main"))
    assert_same(written(found), tensors)
    assert any(snapshot.glob("*.bin")) != has_safetensors
    assert (found == snapshot) == has_safetensors


def test_safetensors_are_preferred(folder: Path) -> None:
    (folder / "adapter_model.safetensors").touch()  # no weights of the model
    assert locate_model(ModelConfig(str(folder))) != folder
    (folder / "model.safetensors").touch()
    assert locate_model(ModelConfig(str(folder))) == folder
