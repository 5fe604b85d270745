"""What every test can rely on: a CPU environment that reaches child processes too, and real ranks."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.ranks import RankPool

# of all tests, child processes too
TOKENS = tempfile.TemporaryDirectory(prefix="tokens-", ignore_cleanup_errors=True)
# Before anything imports torch or DeepSpeed: both read these at import.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",  # no test may depend on the hub
    "HF_DATASETS_CACHE": TOKENS.name,
    "TOKENIZERS_PARALLELISM": "false",
    # DeepSpeed's just-in-time build takes the first ninja on PATH, and another ninja's build is not up to date to it.
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
}


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of DeepSpeed ranks on CPU: `ranks.run(world_size, function, *args)` gives one value per rank."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def device_ranks() -> Iterator[RankPool]:
    """The same of ranks on the simulated device (tests/support/device.py)."""
    from tests.support.device_ranks import start_on_device

    pool = RankPool(start_on_device)
    yield pool
    pool.close()


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        starts = {"ranks", "device_ranks"} & set(cast(pytest.Function, item).fixturenames)
        if starts or "streams" in item.path.parts:
            item.add_marker("ranks")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Adds the seconds of each test to the file of TEST_DURATIONS, the longest first."""
    path = os.environ.get("TEST_DURATIONS")
    if path is None or hasattr(terminalreporter.config, "workerinput"):
        return
    seconds = dict[str, float]()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    with open(path, "a") as file:
        for test in sorted(seconds, key=seconds.__getitem__, reverse=True):
            file.write(f"{seconds[test]:7.2f} {test}\n")


@pytest.fixture
def fresh_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes transformers forget registered classes. Otherwise an earlier test's code would be taken."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
