"""The page of `--answers` in a real browser, Debian's Chromium: nothing runs, texts are right, a phone can show it."""

import json
import shutil
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from loraprune_ds.evaluate.result import answers_page
from tests.integration.heavy.results import TAKES_MINUTES
from tests.integration.launching import run_to_end
from tests.unit.test_answers import EVIL, answered

CHROMIUM = shutil.which("chromium")
pytestmark = [*TAKES_MINUTES, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")]
LONG = "x" * 3000  # no place to break a line
# The page may run no script, so another one holds it in a frame as wide as a screen, and asks the frame.
FRAME = """<!doctype html><meta charset="utf-8"><title></title>
<iframe id="page" width="{width}" height="800" style="border: 0" srcdoc="{page}"></iframe>
<script>
window.onload = () => {{
  const shown = document.getElementById("page").contentDocument;
  document.title = JSON.stringify({{
    width: shown.documentElement.scrollWidth,
    texts: Array.from(shown.querySelectorAll("pre"), (text) => text.textContent),
    left: Array.from(shown.querySelectorAll(".answer"), (box) => box.getBoundingClientRect().left),
    size: Math.min(...Array.from(shown.querySelectorAll("pre"), (text) => parseFloat(getComputedStyle(text).fontSize))),
    scripts: shown.scripts.length,
  }});
}};
</script>"""


def shown(folder: Path, page: str, width: int) -> dict[str, Any]:
    """Returns the facts of a page that is shown `width` CSS pixels wide."""
    (folder / "frame.html").write_text(FRAME.format(width=width, page=escape(page)))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    ended = run_to_end([*command, "--dump-dom", f"file://{folder / 'frame.html'}"], cwd=folder, timeout=120).check()
    return json.loads(unescape(ended.out.partition("<title>")[2].partition("</title>")[0]))


@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1000, 2)])
def test_a_browser_shows_every_text_and_runs_nothing(width: int, columns: int, tmp_path: Path) -> None:
    result = answered(3, EVIL + LONG)
    found = shown(tmp_path, answers_page(result), width)
    assert found["width"] <= width  # it need not be scrolled sideways
    assert found["scripts"] == 0
    assert len(set(found["left"])) == columns
    assert found["size"] >= 14
    models = [result["dense"]["answers"], result["answers"]]
    texts = [model["greedy"]["texts"][0]["text"] for model in models]
    assert found["texts"][:3] == [result["answers_plan"]["prompts"][0]["messages"][0]["content"], *texts]
