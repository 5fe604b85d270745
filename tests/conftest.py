"""What every test can rely on: a CPU environment that reaches child processes too, and real ranks."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def fresh_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes transformers forget registered classes. Otherwise an earlier test's code would be taken."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for mapping in (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", {})
