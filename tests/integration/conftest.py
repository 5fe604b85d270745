"""A finished run, and the inputs of a good one, that several files look at."""

from pathlib import Path
from typing import Any

import pytest

from tests.oracle.models import make_tiny_llama
from tests.support.bad_input import make_material
from tests.support.finished_runs import GLOBAL, LAYERS, SIZES, Case, run_config
from tests.support.gguf_cases import byte_level_tokenizer
from tests.support.launching import fork_ranks, write_config, write_text

VOCAB = 320


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a model dense/, its run/ with cuts after steps 3 and 5, all checkpoints, and text.txt."""
    root = tmp_path_factory.mktemp("finished")
    more: Any = SIZES | {"layers": LAYERS, "vocab": VOCAB, "seed": 3}
    dense = make_tiny_llama(root / "dense", tie=True, biases=True, **more)
    byte_level_tokenizer(dense, VOCAB)
    train = {"global_batch_size": 4, "learning_rate": 1e-2}
    case = Case("run", "pruned_llama", {}, prune=GLOBAL, train=train, evaluate={"max_windows": 4})
    config = run_config(case, dense, root) | {
        "lora": {"r": 4, "lora_dropout": 0.0},
        "checkpoint": {"every": 4},
    }
    config["data"] = {
        "path": str(write_text(root / "text.txt", 6_000)),
        "window": 32,
        "held_out_fraction": 0.2,
    }
    (ended,) = fork_ranks(
        ["--config", str(write_config(root / "run.yaml", config))], root, cwd=root, timeout=300
    )
    ended.check()
    return root
