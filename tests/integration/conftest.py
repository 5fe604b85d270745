"""A finished run, and the inputs of a good one, that several files look at."""

from pathlib import Path
from typing import Any

import pytest

from tests.gguf_cases import byte_level_tokenizer
from tests.integration.bad_input import make_material
from tests.integration.launching import fork_ranks, write_config, write_text
from tests.oracle.models import make_tiny_llama
from tests.paper import PAPER

VOCAB = 320


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a model dense/, its run/ with cuts after steps 3 and 5, all checkpoints, and text.txt."""
    root = tmp_path_factory.mktemp("finished")
    sizes: Any = {"heads": 6, "kv_heads": 3, "hidden": 48, "ffn": 64, "layers": 3, "vocab": VOCAB, "seed": 3}
    dense = make_tiny_llama(root / "dense", tie=True, biases=True, **sizes)
    byte_level_tokenizer(dense, VOCAB)
    prune = PAPER | {"ratio": 0.35, "ranking": "global", "normalize": "none", "prune_every": 2}
    prune |= {"warmup_fraction": 0.2, "cooldown_fraction": 0.2}
    config = {
        "output_dir": str(root / "run"),
        "model": {"path": str(dense), "dtype": "float32"},
        "lora": {"r": 4, "lora_dropout": 0.0},
        "data": {"path": str(write_text(root / "text.txt", 6_000)), "window": 32, "held_out_fraction": 0.2},
        "prune": prune | {"channel_multiple": 1, "protected_first": 0, "protected_last": 0},
        "train": {
            "steps": 6,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "distill_weight": 0,
        },
        "evaluate": {"window": 32, "max_windows": 4},
        "checkpoint": {"every": 4},
    }
    (ended,) = fork_ranks(["--config", str(write_config(root / "run.yaml", config))], root, cwd=root, timeout=300)
    ended.check()
    return root
