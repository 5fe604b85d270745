"""`launch/export.py --push-to-hub`: what a hub gets. The hub is a fake on loopback."""

import base64
import json
import runpy
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from loraprune_ds.checkpoint.run_folder import Status, write_status
from loraprune_ds.errors import UserError
from loraprune_ds.export.hub import check_push, write_model_index
from tests.export_cases import CASES, dense_model, export
from tests.unit.shapes_and_scores import repository

TOKEN = "hf_of_the_test"
REPORT = {
    "perplexity": {"dense": 22.5, "after_last_cut": 30.0, "pruned": 25.25},
    "config": {"data": {"path": "some/where/law.txt", "held_out": None}, "evaluate": {"window": 128}},
}
EVALUATION = {
    "perplexity": 51.5,
    "text": {"name": "wikitext-2-raw-v1"},
    "protocol": {"window": 2048},
    "tasks": {"results": {"piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.01}}},
    "dense": {"perplexity": 40.0, "tasks": {"results": {"piqa": {"acc,none": 0.75, "acc_stderr,none": "N/A"}}}},
}


class FakeHub(BaseHTTPRequestHandler):
    """Answers what an upload of small files asks, and remembers it in `server.seen`."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/small"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/small/commit/1", "commitOid": "1"})
        else:
            self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "me/small", "sha": "0" * 40, "siblings": [], "private": True})

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()


def push(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str, token: str = TOKEN) -> int:
    """Runs launch/export.py. Returns its exit code."""
    monkeypatch.setenv("HF_TOKEN", token)
    words = ["export.py", str(folder), "--out", str(folder.parent / "out"), "--push-to-hub", "me/small", *arguments]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(repository() / "launch/export.py"), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, as far as an export looks at it."""
    folder = tmp_path / "run"
    folder.mkdir()
    export(dense_model(CASES[0]), CASES[0], tmp_path, folder / "model")
    write_status(folder, Status("finished", 3, 3))
    (folder / "report.json").write_text(json.dumps(REPORT))
    return folder


def committed(hub: Any) -> dict[str, bytes]:
    """Returns the files of the last commit."""
    body = next(body for path, _, body in reversed(hub.seen) if "/commit/" in path)
    lines = [json.loads(line) for line in body.splitlines()]
    files = [line["value"] for line in lines if line["key"] == "file"]
    return {file["path"]: base64.b64decode(file["content"]) for file in files}


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


def test_an_upload_is_private_and_has_the_measured_numbers(
    hub: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    assert push(monkeypatch, run, "--results", str(tmp_path / "evaluation.json")) == 0
    out, error = capsys.readouterr()
    assert out.endswith(f"hub: http://127.0.0.1:{hub.server_port}/me/small\n")
    created = next(json.loads(body) for path, _, body in hub.seen if path == "/api/repos/create")
    assert (created["name"], created["organization"], created["visibility"]) == ("small", "me", "private")
    files = committed(hub)
    assert files.keys() == {path.name for path in (run / "model").iterdir()}
    assert all(files[path.name] == path.read_bytes() for path in (run / "model").glob("*.safetensors"))
    card = files["README.md"].decode()
    assert model_index(card) == {
        "small": {"law.txt perplexity": 25.25, "wikitext-2-raw-v1 perplexity": 51.5, "piqa acc": 0.5},
        "small, dense": {"law.txt perplexity": 22.5, "wikitext-2-raw-v1 perplexity": 40.0, "piqa acc": 0.75},
    }
    assert "## Load it" in card
    assert "- loraprune" in card
    assert TOKEN not in card + out + error


def test_the_text_of_a_mixture_is_named_by_its_sources(tmp_path: Path) -> None:
    card, data = tmp_path / "README.md", {"path": [{"path": "some/law.txt"}, {"path": "chats"}], "held_out": None}
    (tmp_path / "report.json").write_text(json.dumps(REPORT | {"config": {"data": data}}))
    card.write_text("---\ntags:\n- pruned\n---\n# Small\n")
    write_model_index(card, "small", tmp_path, [])
    assert model_index(card.read_text())["small"] == {"law.txt + chats perplexity": 25.25}


def test_a_refused_token_is_one_line(
    hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(monkeypatch, run, token="hf_wrong") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --push-to-hub me/small: ")
    assert error.count("\n") == 1


def test_a_card_without_any_measurement_has_no_index(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("---\ntags:\n- pruned\n---\n# Small\n")
    write_model_index(card, "small", tmp_path, [])
    assert "model-index" not in card.read_text()


@pytest.mark.parametrize(
    ("repo", "token", "results", "message"),
    [
        ("small", TOKEN, None, "--push-to-hub small: give it as OWNER/NAME"),
        ("me/sm all", TOKEN, None, "--push-to-hub me/sm all: Repo id must"),
        ("me/small", None, None, "--push-to-hub needs a token: set HF_TOKEN, or run `hf auth login`"),
        ("me/small", TOKEN, {"perplexity": 1.0}, "evaluation.json is not from launch/evaluate.py"),
    ],
)
def test_a_wrong_push_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    repo: str,
    token: str | None,
    results: dict[str, Any] | None,
    message: str,
) -> None:
    monkeypatch.setattr("loraprune_ds.export.hub.get_token", lambda: token)
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match="^(.*/)?" + message.replace("(", r"\(")):
        check_push(repo, [path] if results else [])
