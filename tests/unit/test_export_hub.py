"""`launch/export.py --push-to-hub`: the calls of the hub's API, with a fake in its place, and the card."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest
import yaml
from huggingface_hub import HfApi

from loraprune_ds.checkpoint.layout import Status, write_status
from loraprune_ds.cli.export import main
from loraprune_ds.export.model_card import check_push, write_model_index
from loraprune_ds.report.measured import Value
from tests.support.evaluations import EVALUATION, measured_of
from tests.support.export_cases import CASES, dense_model, export
from tests.support.refusals import must_name

TOKEN = "hf_of_the_test"
TEXT = "some/where/law.txt, windows of 128, bfloat16"
NAMED = "law.txt, windows of 128, bfloat16"  # without folders
REPORT = {"measured": measured_of("model", perplexity=Value(25.25, 22.5, TEXT))}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Stands for HfApi, with the signatures of its methods."""
    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "https://hub/me/small"
    monkeypatch.setattr("loraprune_ds.export.model_card.HfApi", lambda: api)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return api


def push(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> int:
    """Runs the command of launch/export.py. Returns its exit code."""
    words = [
        "export.py",
        str(folder),
        "--out",
        str(folder.parent / "out"),
        "--push-to-hub",
        "me/small",
        *arguments,
    ]
    monkeypatch.setattr(sys, "argv", words)
    return main()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, as far as an export looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    export(dense_model(CASES[0]), CASES[0], tmp_path, folder / "model")
    write_status(folder, Status("finished", 3, 3))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


def model_index(card: str) -> dict[str, dict[str, float]]:
    """Returns metrics by model and data set."""
    found: dict[str, dict[str, float]] = {}
    for model in yaml.safe_load(card.split("---")[1])["model-index"]:
        for result in model["results"]:
            for metric in result["metrics"]:
                assert result["task"]["type"] == "text-generation"
                key = f"{result['dataset']['name']} {metric['type']}"
                found.setdefault(model["name"], {})[key] = metric["value"]
    return found


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_is_private_and_has_the_measured_numbers(
    public: bool,
    hub: Mock,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, out = run.parent / "evaluation.json", run.parent / "out"
    results.write_text(json.dumps(EVALUATION))
    assert push(monkeypatch, run, "--results", str(results), *(["--public"] if public else [])) == 0
    assert capsys.readouterr().out.endswith("hub: https://hub/me/small\n")
    hub.create_repo.assert_called_once_with("me/small", private=not public, exist_ok=True)
    (call,) = hub.upload_folder.call_args_list
    assert (call.kwargs["repo_id"], call.kwargs["folder_path"]) == ("me/small", out)
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (run / "model").iterdir()
    }
    card = (out / "README.md").read_text()
    assert model_index(card) == {
        "small": {
            f"{NAMED} perplexity": 25.25,
            "wikitext2 test, windows of 128, float32 perplexity": 60.0,
            "piqa, boolq accuracy": 0.6,
            "piqa, boolq piqa acc": 0.5,
        },
        "small, dense": {
            f"{NAMED} perplexity": 22.5,
            "wikitext2 test, windows of 128, float32 perplexity": 50.0,
            "piqa, boolq accuracy": 0.8,
            "piqa, boolq piqa acc": 0.8,
        },
    }
    assert "## Load it" in card
    assert "- loraprune" in card


def test_a_card_without_measurements_has_no_index(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags:\n- pruned\n---\n# Small\n")
    write_model_index(card, "small", tmp_path, [])
    assert "model-index" not in card.read_text()


def test_a_refused_token_is_one_line(
    hub: Mock, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.create_repo.side_effect = OSError("401 Client Error\n\nInvalid username or password.")
    assert push(monkeypatch, run) == 2
    assert capsys.readouterr().err == "error: --push-to-hub me/small: 401 Client Error\n"


@pytest.mark.parametrize(
    ("repo", "token", "results", "names"),
    [
        ("small", TOKEN, None, "small OWNER/NAME"),
        ("me/sm all", TOKEN, None, "me/sm all"),
        ("me/small", None, None, "HF_TOKEN"),
        ("me/small", TOKEN, {"perplexity": 1.0}, "evaluation.json"),
    ],
)
def test_a_wrong_push_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repo: str,
    token: str | None,
    results: Any,
    names: str,
) -> None:
    monkeypatch.setattr("loraprune_ds.export.model_card.get_token", lambda: token)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(results))
    must_name(names, check_push, repo, [path] if results else [])
