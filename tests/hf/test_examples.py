"""The scripts of launch/examples on two ranks: what they write loads, and agrees with the live model."""

from pathlib import Path

import pytest

from tests.hf.examples import SCRIPTS, check_example
from tests.oracle.models import make_tiny_llama
from tests.ranks import RankPool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "model"
    return make_tiny_llama(folder, heads=8, kv_heads=4, head_dim=8, hidden=64, ffn=640, layers=4, vocab=97, seed=1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_prunes_and_what_it_writes_agrees(ranks: RankPool, model: Path, tmp_path: Path, script: str) -> None:
    check_example(ranks, model, tmp_path, script)
